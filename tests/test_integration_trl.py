"""TRL's GRPOTrainer as GFT's: what is in a group, and the loss and gradients of the project's own trainer."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import trainer_rig as rig
from datasets import Dataset
from test_trainer import Gradients

trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'gft-kernels[trl]'")

import trl_rig  # noqa: E402

from gft_kernels.integrations.trl import GFTTrainer  # noqa: E402
from gft_kernels.trainer.data import Response, RowError  # noqa: E402
from gft_kernels.trainer.groups import Group, collate, count_items, weigh  # noqa: E402

# The logits path would compute the right thing the wrong way.
pytestmark = pytest.mark.filterwarnings("error:the GFT loss")
UPSTREAM = 1.7


def generated(trainer, rows: int) -> tuple[list[dict], dict]:
    """A batch of `rows` whole groups as TRL's sampler repeats them, and what the trainer makes of it."""
    size = trainer.num_generations
    repeated = [dict(trainer.train_dataset[i // size]) for i in range(rows * size)]
    trainer.model.train()
    return repeated, trainer._generate_and_score_completions(repeated)


def completions(output: dict) -> list[list[int]]:
    pairs = zip(output["completion_ids"], output["completion_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in pairs]


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (rig.llama, {}),
        (rig.llama, {"reduction": "sequence-mean", "tau": 0.03, "temperature": 1.3, "rectify": "positive"}),
        (lambda: rig.gpt2(dropout=0.0), {"tau": 0.3, "normalize": "leave-one-out"}),  # positions from 0 in each row
    ],
)
def test_the_loss_and_gradients_are_those_of_the_projects_trainer(tmp_path, model, options):
    ours, untouched = trl_rig.trainer(tmp_path, model(), per_device_train_batch_size=16, **options), model()
    _, output = generated(ours, rows=4)
    ours.current_gradient_accumulation_steps = 1
    loss = ours._compute_loss(ours.model, output)
    (UPSTREAM * loss).backward()

    theirs = rig.trainer(tmp_path, untouched, rig.rows(4), **options)
    assert ours.model.state_dict().keys() == theirs.model.state_dict().keys()
    responses = [
        Response(rig.tokenizer().decode(ids, skip_special_tokens=True), ids, "sampled") for ids in completions(output)
    ]
    groups = [Group(row, responses[4 * i : 4 * i + 4]) for i, row in enumerate(theirs.train_dataset)]
    theirs.builder._reward(groups)
    weigh(groups, theirs.args)
    inputs = collate(groups, theirs.builder.pad_id)
    expected = theirs.compute_loss(theirs.model, inputs, num_items_in_batch=count_items(groups, theirs.args.reduction))
    (UPSTREAM * expected).backward()

    assert len({len(row.prompt_ids) for row in theirs.train_dataset}) > 1  # so that padding has a side
    assert abs(expected.item()) > 1e-3
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    theirs_by_name = gradients(theirs.model)
    for name, gradient in gradients(ours.model).items():
        assert (gradient - theirs_by_name[name]).norm() <= 1e-6 * max(theirs_by_name[name].norm(), 1e-3), name


def test_demonstrations_take_the_first_places_and_the_policy_the_rest(tmp_path):
    trainer, tokenizer = trl_rig.trainer(tmp_path), rig.tokenizer()
    rows, output = generated(trainer, rows=2)
    found = completions(output)
    for i, row in enumerate(rows):
        given = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in row["demonstrations"]]
        if i % 4 < 2:
            assert found[i] == given[i % 4]
        else:
            assert found[i] not in given  # random weights do not write the demonstrations
    assert found[2] != found[3]


def test_a_group_may_be_given_whole(tmp_path):
    trainer = trl_rig.trainer(tmp_path, num_demonstrations=2, num_generations=2)
    trainer.model.generate = None  # not to be called
    trainer.train()
    assert trainer.state.global_step == 2


def test_evaluation_samples_every_response(tmp_path):
    evaluation = Dataset.from_list([{"prompt": row["prompt"], "answer": row["answer"]} for row in rig.rows(2)])
    trainer = trl_rig.trainer(tmp_path, evaluation=evaluation, num_generations_eval=2)
    metrics = trainer.evaluate()
    assert 0 < metrics["eval_reward"] < 1.5 and metrics["eval_entropy"] > 2  # of 20 tokens: log 20 = 3.0


@pytest.mark.parametrize("reduction", ["token-mean", "sequence-mean"])
@pytest.mark.parametrize(("micro_batch", "accumulation"), [(8, 2), (4, 4), (2, 8)])
def test_a_step_does_not_depend_on_how_it_is_cut(tmp_path, reduction, micro_batch, accumulation):
    """Groups may be cut into micro-batches, for advantages are taken before."""

    def step(size, parts):
        seen = Gradients()
        trl_rig.trainer(
            tmp_path, callbacks=[seen], reduction=reduction, max_steps=1,
            per_device_train_batch_size=size, gradient_accumulation_steps=parts,
        ).train()  # fmt: skip
        return seen.steps[0]

    whole, parts = step(16, 1), step(micro_batch, accumulation)
    assert whole.norm() > 1e-2
    assert (whole - parts).norm() <= 1e-6 * whole.norm()


def test_several_steps_of_one_generation_divide_it_into_equal_parts(tmp_path):
    """Four steps of one generation batch at a learning rate of 0 sum to four times its mean."""
    options = {"learning_rate": 0.0, "per_device_train_batch_size": 4}
    seen, whole = Gradients(), Gradients()
    trl_rig.trainer(tmp_path, callbacks=[seen], max_steps=4, steps_per_generation=4, **options).train()
    trl_rig.trainer(tmp_path, callbacks=[whole], max_steps=1, gradient_accumulation_steps=4, **options).train()
    assert len(seen.steps) == 4 and (seen.steps[0] - seen.steps[1]).norm() > 1e-2
    assert (sum(seen.steps) - 4 * whole.steps[0]).norm() <= 1e-5 * whole.steps[0].norm()


def test_equal_rewards_and_completions_without_a_reward_weigh_nothing(tmp_path):
    def some(prompts, completions, **columns):
        """The first group's rewards are equal; of the second's, one is None, and of the third's all but one."""
        return [0.1] * 4 + [1.0, 0.0, None, 0.0] + [None, None, None, 1.0]

    trainer = trl_rig.trainer(tmp_path, reward_funcs=some, per_device_train_batch_size=12)
    advantages = generated(trainer, rows=3)[1]["advantages"]
    baseline = torch.tensor([1.0, 0.0, 0.0])
    left = (baseline - baseline.mean()) / (baseline.std() + 1e-6)
    expected = torch.cat([torch.zeros(4), left[:2], torch.zeros(1), left[2:], torch.zeros(4)])
    assert torch.equal(advantages == 0, expected == 0)
    torch.testing.assert_close(advantages, expected)
    assert list(trainer._logs["advantages"]) == advantages.tolist()  # TRL's table shows those of the loss


def test_several_reward_functions_are_weighted(tmp_path):
    def length(prompts, completions, **columns):
        return [float(len(text)) for text in completions]

    trainer = trl_rig.trainer(tmp_path, reward_funcs=[rig.digit_count, length], reward_weights=[2.0, -0.5])
    rows, output = generated(trainer, rows=2)
    texts = [rig.tokenizer().decode(ids, skip_special_tokens=True) for ids in completions(output)]
    counts = torch.tensor(rig.digit_count(None, texts, [row["answer"] for row in rows]))
    rewards = (2 * counts - 0.5 * torch.tensor(length(None, texts))).view(2, 4)
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
    torch.testing.assert_close(output["advantages"], expected.flatten())


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
def test_no_step_holds_logits(tmp_path, precision):
    """Not even where accelerate has wrapped the patched forward for mixed precision."""
    trainer, returned = trl_rig.trainer(tmp_path, max_steps=1, **precision), []
    trainer.model.register_forward_hook(lambda module, inputs, output: returned.append(output))
    trainer.train()
    losses = [output for output in returned if output.loss is not None]
    assert losses and all(output.logits is None and output.stats is not None for output in losses)


@pytest.mark.parametrize("model", [rig.llama, lambda: rig.gpt2(dropout=0.0)])
def test_log_probabilities_are_those_of_unpadded_rows(tmp_path, model):
    trainer, untouched = trl_rig.trainer(tmp_path, model(), temperature=0.8), model()
    _, output = generated(trainer, rows=2)
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], 1).bool()
    length = output["completion_ids"].shape[1]
    found, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask.long(), length, batch_size=3)
    assert len({int(n) for n in output["prompt_mask"].sum(1)}) > 1 and found.shape == (8, length)
    for s in range(8):
        row, tokens = ids[s][mask[s]], int(output["completion_mask"][s].sum())
        log_pi = torch.log_softmax(untouched(row[None]).logits[0, :-1] / 0.8, -1)
        truth = log_pi.gather(1, row[1:, None])[-tokens:, 0]
        torch.testing.assert_close(found[s, :tokens], truth, rtol=1e-4, atol=1e-5)


def test_several_steps_on_one_generation_log_how_far_the_policy_has_moved(tmp_path):
    trainer = trl_rig.trainer(tmp_path, max_steps=2, num_iterations=2, learning_rate=3.0)
    moved, start = [], copy.deepcopy(trainer.model.state_dict())
    compute = trainer._compute_loss

    def watched(model, inputs):
        moved.append((copy.deepcopy(model.state_dict()), inputs))
        return compute(model, inputs)

    trainer._compute_loss = watched
    trainer.train()
    first, second = (line for line in trainer.state.log_history if "loss" in line)
    assert first["drift/kl"] == pytest.approx(0, abs=1e-6)

    (_, inputs), (weights, again) = moved
    assert inputs["sampled"].sum() == 4 and torch.equal(inputs["old_per_token_logps"], again["old_per_token_logps"])
    ratio = {}
    for name, state in (("now", weights), ("then", start)):
        trainer.model.load_state_dict(state)
        ids = torch.cat([again["prompt_ids"], again["completion_ids"]], 1)
        mask = torch.cat([again["prompt_mask"], again["completion_mask"]], 1)
        arguments = (trainer.model, ids, mask, again["completion_ids"].shape[1])
        ratio[name] = trainer._get_per_token_logps_and_entropies(*arguments)[0].double()
    log_ratio, live = ratio["now"] - ratio["then"], again["completion_mask"].bool()
    sampled = live & again["sampled"][:, None]
    kl = (log_ratio.exp() - 1 - log_ratio)[sampled].mean().item()
    assert second["drift/kl"] == pytest.approx(kl, rel=1e-3) and kl > 1e-4
    assert second["drift/mean_abs_log_ratio"] == pytest.approx(log_ratio[live].abs().mean().item(), rel=1e-3)


def test_truncated_completions_leave_the_loss_but_not_the_baseline(tmp_path):
    """TRL's mask_truncated_completions: their tokens count nowhere, their rewards do."""
    _, output = generated(trl_rig.trainer(tmp_path, per_device_train_batch_size=16), rows=4)
    trainer = trl_rig.trainer(tmp_path, per_device_train_batch_size=16, mask_truncated_completions=True)
    _, masked = generated(trainer, rows=4)
    assert torch.equal(masked["completion_ids"], output["completion_ids"])
    torch.testing.assert_close(masked["advantages"], output["advantages"])
    cut = ~masked["completion_mask"].any(1)
    assert 0 < cut.sum() < 8
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(trainer.model, masked)
    kept = {name: value[~cut] if value.dim() else value for name, value in masked.items()}
    assert kept["num_items_in_batch"] == kept["completion_mask"].sum()
    torch.testing.assert_close(loss, trainer._compute_loss(trainer.model, kept))


def test_a_run_learns_logs_and_saves_what_can_be_loaded(tmp_path):
    trainer = trl_rig.trainer(
        tmp_path, per_device_train_batch_size=16, max_steps=60, learning_rate=1e-2, optim="adamw_torch",
        max_grad_norm=1.0, num_demonstrations=1,
    )  # fmt: skip
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert {"pi", "rectified", "entropy", "reward"} <= lines[0].keys()
    early, late = (sum(line["reward"] for line in part) / 10 for part in (lines[:10], lines[-10:]))
    assert late > early + 0.1
    trainer.save_model(str(tmp_path / "saved"))
    loaded = type(trainer.model).from_pretrained(tmp_path / "saved").state_dict()
    assert loaded.keys() == before.keys()
    assert all(torch.equal(loaded[name], value) for name, value in trainer.model.state_dict().items())
    assert any(not torch.equal(loaded[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_demonstrations": 5}, r"num_demonstrations must be at most num_generations = 4, .* got 5"),
        ({"num_demonstrations": -1}, r"num_demonstrations must be a whole number of at least 0, got -1"),
        ({"per_device_train_batch_size": 2, "generation_batch_size": 2, "num_generations": 2,
          "num_demonstrations": 3}, r"num_demonstrations must be at most"),
        ({"beta": 0.1}, r"beta must be left at 0.0, got 0.1; it belongs to GRPO's objective"),
        ({"loss_type": "grpo"}, r"loss_type must be left at 'dapo', got 'grpo'"),
        ({"scale_rewards": "none"}, r"scale_rewards must be left at 'group', got 'none'"),
        ({"epsilon_high": 0.28}, r"epsilon_high must be left at None, got 0.28"),
        ({"entropy_coef": 0.01}, r"entropy_coef must be left at 0.0, got 0.01"),
        ({"vllm_importance_sampling_correction": True}, r"vllm_importance_sampling_correction must be False"),
        ({"tau": 1.5}, r"tau must lie in \[0, 1\], got 1.5"),
        ({"rectify": "some"}, r"rectify must be one of"),
        ({"normalize": "max"}, r"normalize must be one of"),
        ({"reduction": "sum"}, r"reduction must be one of token-mean, sequence-mean, got 'sum'"),
        ({"backend": "gpu"}, r"backend must be one of"),
    ],
)  # fmt: skip
def test_options_that_cannot_work_are_refused(tmp_path, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        trl_rig.config(tmp_path, **options)


def test_groups_must_be_whole_on_each_process(tmp_path, monkeypatch):
    """Two processes, a group of four on each pair of rows: TRL alone would allow it."""
    monkeypatch.setattr(trl.GRPOConfig, "world_size", 2)
    with pytest.raises(ValueError, match=r"must be a multiple of num_generations = 4, got 2; groups must be whole on"):
        trl_rig.config(tmp_path, per_device_train_batch_size=2)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"demonstrations": ["#1."]},
            r"train_dataset\[0\]: field `demonstrations` must hold at least .* 2 texts, got 1",
        ),
        ({"demonstrations": ["1" * 10, "#1."]}, r"train_dataset\[0\]: a demonstration has 11 tokens, max_completion"),
        ({"demonstrations": ["", "#1."]}, r"train_dataset\[0\]: field `demonstrations` must be a list of non-empty"),
    ],
)
def test_rows_that_cannot_make_a_group_are_named(tmp_path, change, sentence):
    rows = rig.rows(4)
    rows[0] |= change
    with pytest.raises(RowError, match=sentence):
        trl_rig.trainer(tmp_path, rows=rows)


def test_what_is_not_one_turn_of_text_is_refused(tmp_path):
    for name, value in (("tools", [print]), ("rollout_func", print), ("environment_factory", print)):
        with pytest.raises(ValueError, match=f"{name} must be left out, got a value"):
            GFTTrainer(rig.llama(), rig.digit_count, trl_rig.config(tmp_path), **{name: value})
    with pytest.raises(TypeError, match=r"args must be a gft_kernels\.integrations\.trl\.GFTConfig, got GRPOConfig"):
        GFTTrainer(rig.llama(), rig.digit_count, trl.GRPOConfig(str(tmp_path), use_cpu=True, bf16=False))


def test_the_hooks_of_the_installed_trl_are_the_ones_taken_over():
    """A canary: what gft_kernels.integrations.trl overrides or calls is there and takes what it is given."""
    base = trl.GRPOTrainer
    expected = {
        "_generate_and_score_completions": ["self", "inputs"],
        "_generate_single_turn": ["self", "prompt_ids", "images", "multimodal_fields", "num_generations"],
        "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
        "_compute_loss": ["self", "model", "inputs"],
        "_get_per_token_logps_and_entropies": [
            "self",
            "model",
            "input_ids",
            "attention_mask",
            "logits_to_keep",
            "batch_size",
        ],
    }
    for name, parameters in expected.items():
        assert list(inspect.signature(getattr(base, name)).parameters)[: len(parameters)] == parameters, name
    for source, called in (
        (base._generate_and_score_completions, "self._calculate_rewards("),
        (base._generate, "self._generate_single_turn("),
        (base.compute_loss, "return self._compute_loss(model, inputs)"),
        (base._generate_and_score_completions, "old_per_token_logps, _, _ = self._get_per_token_logps_and_entropies("),
        (base._compute_loss, 'inputs["num_items_in_batch"]'),
    ):
        assert called in inspect.getsource(source)
