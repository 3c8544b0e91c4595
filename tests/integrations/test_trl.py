"""TRL's GRPOTrainer as GFT's: the loss and gradients of the library's own trainer, however a step is cut."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import trainer_rig as rig

trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'gft-kernels[trl]'")

import trl_rig  # noqa: E402

from gft_kernels.data.rows import Response  # noqa: E402
from gft_kernels.trainer.groups import Group, collate, count_items, weigh  # noqa: E402

# The logits path would compute the right thing the wrong way.
pytestmark = pytest.mark.filterwarnings("error:the GFT loss")
UPSTREAM = 1.7


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
    _, output = trl_rig.generated(ours, rows=4)
    ours.current_gradient_accumulation_steps = 1
    loss = ours._compute_loss(ours.model, output)
    (UPSTREAM * loss).backward()

    theirs = rig.trainer(tmp_path, untouched, rig.rows(4), **options)
    assert ours.model.state_dict().keys() == theirs.model.state_dict().keys()
    responses = [
        Response(rig.tokenizer().decode(ids, skip_special_tokens=True), ids, "sampled")
        for ids in trl_rig.completions(output)
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
    trl_rig.assert_same_gradients(ours.model, theirs.model, 1e-6, 1e-3)


@pytest.mark.parametrize("reduction", ["token-mean", "sequence-mean"])
@pytest.mark.parametrize(("micro_batch", "accumulation"), [(8, 2), (4, 4), (2, 8)])
def test_a_step_does_not_depend_on_how_it_is_cut(tmp_path, reduction, micro_batch, accumulation):
    """Groups may be cut into micro-batches, for advantages are taken before."""

    def step(size, parts):
        seen = rig.Gradients()
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
    seen, whole = rig.Gradients(), rig.Gradients()
    trl_rig.trainer(tmp_path, callbacks=[seen], max_steps=4, steps_per_generation=4, **options).train()
    trl_rig.trainer(tmp_path, callbacks=[whole], max_steps=1, gradient_accumulation_steps=4, **options).train()
    assert len(seen.steps) == 4 and (seen.steps[0] - seen.steps[1]).norm() > 1e-2
    assert (sum(seen.steps) - 4 * whole.steps[0]).norm() <= 1e-5 * whole.steps[0].norm()


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
    _, output = trl_rig.generated(trainer, rows=2)
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
    first, second = rig.trained(trainer)
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


def test_advantages_weigh_the_tokens_of_trls_entropy_quantile(tmp_path):
    trainer = trl_rig.trainer(tmp_path, per_device_train_batch_size=16, top_entropy_quantile=0.4, tau=0.0)
    _, inputs = trl_rig.generated(trainer, rows=4)
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(trainer.model, inputs)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    with torch.no_grad():
        logits = rig.llama()(ids, attention_mask=mask).logits[:, -inputs["completion_ids"].shape[1] - 1 : -1].double()
    log_pi, live = logits.log_softmax(-1), inputs["completion_mask"].bool()
    entropy = -(log_pi.exp() * log_pi).sum(-1)
    chosen = live & (entropy >= torch.quantile(entropy[live], 0.6))
    log_pi = log_pi.gather(2, inputs["completion_ids"][..., None])[..., 0]
    expected = -(inputs["advantages"][:, None] * log_pi * chosen).sum() / live.sum()
    assert 0.3 < chosen.sum() / live.sum() < 0.5 and abs(expected) > 1e-3
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    with pytest.raises(ValueError, match="top_entropy_quantile must lie above 0 and at most at 1, got 0"):
        trl_rig.config(tmp_path, top_entropy_quantile=0)


def test_truncated_completions_leave_the_loss_but_not_the_baseline(tmp_path):
    """TRL's mask_truncated_completions: their tokens count nowhere, their rewards do."""
    _, output = trl_rig.generated(trl_rig.trainer(tmp_path, per_device_train_batch_size=16), rows=4)
    trainer = trl_rig.trainer(tmp_path, per_device_train_batch_size=16, mask_truncated_completions=True)
    _, masked = trl_rig.generated(trainer, rows=4)
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
    lines = rig.trained(trainer)
    assert {"pi", "rectified", "entropy", "reward"} <= lines[0].keys()
    early, late = (sum(line["reward"] for line in part) / 10 for part in (lines[:10], lines[-10:]))
    assert late > early + 0.1
    trainer.save_model(str(tmp_path / "saved"))
    loaded = type(trainer.model).from_pretrained(tmp_path / "saved").state_dict()
    assert loaded.keys() == before.keys()
    assert all(torch.equal(loaded[name], value) for name, value in trainer.model.state_dict().items())
    assert any(not torch.equal(loaded[name], value) for name, value in before.items())


def test_the_hooks_of_the_installed_trl_are_the_ones_taken_over():
    """A canary: what gft_kernels.integrations.trl overrides or calls is there and takes what it is given."""
    base = trl.GRPOTrainer
    expected = {
        "_generate_and_score_completions": ["self", "inputs"],
        "_generate_single_turn": ["self", "prompt_ids", "images", "multimodal_fields", "num_generations"],
        "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
        "_compute_loss": ["self", "model", "inputs"],
    }
    asked = ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"]
    expected["_get_per_token_logps_and_entropies"] = asked
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
