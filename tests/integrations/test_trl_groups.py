"""TRL's GRPOTrainer on hybrid groups: who is in a group, what its advantages are, and what is refused by name."""

from __future__ import annotations

import chat_tokenizers
import pytest
import torch
import trainer_rig as rig
from datasets import Dataset
from tiny_families import tiny

trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'gft-kernels[trl]'")

import trl_rig  # noqa: E402

from gft_kernels.data import scratch  # noqa: E402
from gft_kernels.data.readers import RowError  # noqa: E402
from gft_kernels.integrations.trl import GFTGRPOTrainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("error:the GFT loss")


def test_demonstrations_take_the_first_places_and_the_policy_the_rest(tmp_path):
    trainer, tokenizer = trl_rig.trainer(tmp_path), rig.tokenizer()
    rows, output = trl_rig.generated(trainer, rows=2)
    found = trl_rig.completions(output)
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


def test_scale_rewards_is_the_normalisation(tmp_path):
    def some(prompts, completions, **columns):
        return [1.0, 0.0, 0.5, 0.25, 1.0, 0.0, None, 0.0]

    for scale, name in (("group", "std"), (True, "std"), ("none", "mean"), (False, "mean"), ("batch", "batch")):
        assert trl_rig.config(tmp_path, scale_rewards=scale).normalize == name
    trainer = trl_rig.trainer(tmp_path, reward_funcs=some, scale_rewards="batch")
    advantages = trl_rig.generated(trainer, rows=2)[1]["advantages"]
    first, second = torch.tensor([1.0, 0.0, 0.5, 0.25]), torch.tensor([1.0, 0.0, 0.0])
    spread = torch.cat([first, second]).std() + 1e-6
    left, right = ((group - group.mean()) / spread for group in (first, second))
    expected = torch.cat([left, right[:2], torch.zeros(1), right[2:]])
    torch.testing.assert_close(advantages, expected)
    with pytest.raises(ValueError, match="scale_rewards must be 'group' with normalize, got 'none'"):
        trl_rig.config(tmp_path, scale_rewards="none", normalize="leave-one-out")
    with pytest.raises(ValueError, match="scale_rewards must be one of group, batch, none, got 'all'"):
        trl_rig.config(tmp_path, scale_rewards="all")


def test_equal_rewards_and_completions_without_a_reward_weigh_nothing(tmp_path):
    def some(prompts, completions, **columns):
        """The first group's rewards are equal; of the second's, one is None, and of the third's all but one."""
        return [0.1] * 4 + [1.0, 0.0, None, 0.0] + [None, None, None, 1.0]

    trainer = trl_rig.trainer(tmp_path, reward_funcs=some, per_device_train_batch_size=12)
    advantages = trl_rig.generated(trainer, rows=3)[1]["advantages"]
    baseline = torch.tensor([1.0, 0.0, 0.0])
    left = (baseline - baseline.mean()) / (baseline.std() + 1e-6)
    expected = torch.cat([torch.zeros(4), left[:2], torch.zeros(1), left[2:], torch.zeros(4)])
    assert torch.equal(advantages == 0, expected == 0)
    torch.testing.assert_close(advantages, expected)
    assert list(trainer._logs["advantages"]) == advantages.tolist()  # TRL's table shows those of the loss


@pytest.mark.parametrize("reward", [float("inf"), float("-inf")])
def test_a_reward_that_is_infinite_is_refused(tmp_path, reward):
    def infinite(prompts, **columns):
        return [None, 0.0, reward, 1.0] * 2

    trainer = trl_rig.trainer(tmp_path, reward_funcs=[rig.digit_count, infinite])
    with pytest.raises(ValueError, match=f"reward function infinite must return finite numbers or None, got {reward}"):
        trl_rig.generated(trainer, rows=2)


@pytest.mark.parametrize("rewards", [[None] * 8, [None] * 7 + [1.0]])
def test_at_most_one_reward_of_a_batch_weighs_nothing(tmp_path, rewards):
    """One number has no spread, and no baseline beside it."""
    trainer = trl_rig.trainer(tmp_path, reward_funcs=lambda prompts, **columns: rewards, scale_rewards="batch")
    assert not trl_rig.generated(trainer, rows=2)[1]["advantages"].any()


def test_several_reward_functions_are_weighted(tmp_path):
    def length(prompts, completions, **columns):
        return [float(len(text)) for text in completions]

    trainer = trl_rig.trainer(tmp_path, reward_funcs=[rig.digit_count, length], reward_weights=[2.0, -0.5])
    rows, output = trl_rig.generated(trainer, rows=2)
    texts = [rig.tokenizer().decode(ids, skip_special_tokens=True) for ids in trl_rig.completions(output)]
    counts = torch.tensor(rig.digit_count(None, texts, [row["answer"] for row in rows]))
    rewards = (2 * counts - 0.5 * torch.tensor(length(None, texts))).view(2, 4)
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
    torch.testing.assert_close(output["advantages"], expected.flatten())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_demonstrations": 5}, r"num_demonstrations must be at most num_generations = 4, .* got 5"),
        ({"num_demonstrations": -1}, r"num_demonstrations must be a whole number of at least 0, got -1"),
        ({"per_device_train_batch_size": 2, "generation_batch_size": 2, "num_generations": 2,
          "num_demonstrations": 3}, r"num_demonstrations must be at most"),
        ({"beta": 0.1}, r"beta must be left at 0.0, got 0.1; it belongs to GRPO's objective"),
        ({"loss_type": "grpo"}, r"loss_type must be left at 'dapo', got 'grpo'"),
        ({"importance_sampling_level": "sequence"}, r"importance_sampling_level must be left at 'token', got 'seq"),
        ({"epsilon_high": 0.28}, r"epsilon_high must be left at None, got 0.28"),
        ({"entropy_coef": 0.01}, r"entropy_coef must be left at 0.0, got 0.01"),
        ({"vllm_importance_sampling_correction": True}, r"vllm_importance_sampling_correction must be False"),
        ({"generation_kwargs": {"eos_token_id": 5}}, r"generation_kwargs must leave eos_token_id out, got 5; name it"),
    ],
)  # fmt: skip
def test_options_that_cannot_work_are_refused(tmp_path, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        trl_rig.config(tmp_path, **options)


def test_a_router_loss_is_refused(tmp_path):
    """TRL weighs it by an option of its own, which the patched model would not read."""
    with pytest.raises(ValueError, match=r"router_aux_loss_coef must be 0\.0, got 0\.02; the GFT loss has no router"):
        trl_rig.trainer(tmp_path, model=tiny("mixtral"), router_aux_loss_coef=0.02)
    trl_rig.trainer(tmp_path, model=tiny("mixtral"), router_aux_loss_coef=0.0)


def test_a_router_loss_that_is_switched_off_is_off(tmp_path):
    """Also for a model whose own configuration asks for it; TRL's GRPOTrainer leaves that as it is."""

    def loss(wanted: bool, inputs: dict | None) -> tuple[float, dict]:
        model = tiny("mixtral")
        model.config.output_router_logits, model.router_aux_loss_coef = wanted, 5.0
        trainer = trl_rig.trainer(tmp_path, model=model, router_aux_loss_coef=0.0)
        inputs = inputs or trl_rig.generated(trainer, rows=2)[1]
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        return trainer._compute_loss(trainer.model, inputs).item(), inputs

    without, inputs = loss(False, None)
    assert loss(True, inputs)[0] == pytest.approx(without, rel=1e-6)


def test_groups_must_be_whole_on_each_process(tmp_path, monkeypatch):
    """Two processes, a group of four on each pair of rows: TRL alone would allow it."""
    monkeypatch.setattr(trl.GRPOConfig, "world_size", 2)
    with pytest.raises(ValueError, match=r"must be a multiple of num_generations = 4, got 2; groups must be whole on"):
        trl_rig.config(tmp_path, per_device_train_batch_size=2)


@pytest.mark.parametrize(
    ("demonstrations", "sentence"),
    [(["#1."], "field `demonstrations` must hold at least .* 2 texts, got 1"),
     (["1" * 10, "#1."], "a demonstration has 11 tokens, max_completion"),
     (["", "#1."], "field `demonstrations` must be a list of non-empty")],
)  # fmt: skip
def test_rows_that_cannot_make_a_group_are_named(tmp_path, demonstrations, sentence):
    rows = rig.rows(4)
    rows[0]["demonstrations"] = demonstrations
    with pytest.raises(RowError, match=rf"train_dataset\[0\]: {sentence}"):
        trl_rig.trainer(tmp_path, rows=rows)


@pytest.mark.parametrize(("name", "value"), [("tools", [{"name": "f"}]), ("chat_template_kwargs", {"thinking": True})])
def test_what_trl_does_not_show_to_the_template_is_refused(tmp_path, name, value):
    rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}], name: value} for row in rig.rows(4)]
    with pytest.raises(RowError, match=rf"train_dataset\[0\]: field `{name}` must be left out, got one that TRL does"):
        trl_rig.trainer(tmp_path, rows=rows)


def test_demonstrations_and_samples_end_as_the_template_closes_a_turn(tmp_path):
    tokenizer = chat_tokenizers.tokenizer("gemma")
    rows = [{"prompt": [{"role": "user", "content": "q"}], "demonstrations": ["a x", "x<end_of_turn>"]}] * 2
    trainer = GFTGRPOTrainer(
        scratch.small_llama(tokenizer, width=32, layers=1, heads=2, context=64),
        lambda completions, **columns: [float(len(c[0]["content"])) for c in completions],
        trl_rig.config(tmp_path),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    ends = tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>"])
    assert set(trainer.eos_token_ids) == set(trainer.generation_config.eos_token_id) == set(ends)
    found = trl_rig.completions(trl_rig.generated(trainer, rows=2)[1])
    assert [tokenizer.decode(ids) for ids in found[:2]] == ["a x<end_of_turn>", "x<end_of_turn>"]
    assert all(not set(ends) & set(ids[:-1]) for ids in found)


def test_what_is_not_one_turn_of_text_is_refused(tmp_path):
    for name, value in (("tools", [print]), ("rollout_func", print), ("environment_factory", print)):
        with pytest.raises(ValueError, match=f"{name} must be left out, got a value"):
            GFTGRPOTrainer(rig.llama(), rig.digit_count, trl_rig.config(tmp_path), **{name: value})
    with pytest.raises(TypeError, match=r"args must be a gft_kernels.*GFTGRPOConfig, got GRPOConfig"):
        GFTGRPOTrainer(rig.llama(), rig.digit_count, trl.GRPOConfig(str(tmp_path), use_cpu=True, bf16=False))


def test_an_adapter_of_virtual_tokens_is_refused(tmp_path):
    """PEFT drops the positions, so what a padded row is worth would depend on its padding."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(rig.llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match="model must be adapted in its weights, got PROMPT_TUNING"):
        trl_rig.trainer(tmp_path, model)


def test_the_names_of_before_are_still_found():
    from gft_kernels.integrations import trl as adapter

    for before, now in (("GFTConfig", adapter.GFTGRPOConfig), ("GFTTrainer", adapter.GFTGRPOTrainer)):
        with pytest.warns(DeprecationWarning, match=f"{before} is now called {now.__name__}"):
            assert getattr(adapter, before) is now
    with pytest.raises(AttributeError, match="GFTNothing"):
        _ = adapter.GFTNothing
