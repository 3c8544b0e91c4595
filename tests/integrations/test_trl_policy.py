"""`policy_loss` against TRL's own GRPOTrainer: one batch, every loss type that has a counterpart, loss and gradients.

The table of docs/integrations/trl.md is the one tested here.
"""

from __future__ import annotations

import pytest
import torch
import trainer_rig as rig
from datasets import Dataset

from gft_kernels import policy_loss

trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'gft-kernels[trl]'")

import trl_rig  # noqa: E402

LOW, HIGH, TEMPERATURE, UPSTREAM = 0.2, 0.3, 0.8, 1.7
ACCUMULATION, PER_GENERATION = 2, 4  # half of the generation batch's micro-batches make a step
COUNTERPART = {
    **{name: (name, "token-mean") for name in ("bnpo", "dapo", "dr_grpo", "cispo")},
    **{name: (name, "sequence-mean") for name in ("grpo", "sapo")},
    "grpo, by sequence": ("gspo", "sequence-mean"),
}


@pytest.fixture(scope="module")
def micro_batch(tmp_path_factory) -> dict[str, torch.Tensor]:
    """Ragged prompts and completions with log-probabilities of an older and of a reference policy beside them."""
    trainer = grpo(tmp_path_factory.mktemp("batch"), "grpo")
    trainer.model.train()
    rows = [dict(trainer.train_dataset[i // 4]) for i in range(16)]
    inputs = trainer._generate_and_score_completions(rows)
    generator = torch.Generator().manual_seed(11)

    def moved(size: float) -> torch.Tensor:
        now = log_probs(rig.llama(), inputs).detach()
        return now + size * torch.randn(now.shape, generator=generator)

    inputs["old_per_token_logps"], inputs["ref_per_token_logps"] = moved(0.4), moved(0.7)
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum() * PER_GENERATION  # of three more micro-batches
    return inputs


def grpo(folder, loss_type: str, **options):
    args = trl.GRPOConfig(
        str(folder), loss_type=loss_type, num_generations=4, max_completion_length=10, temperature=TEMPERATURE,
        **{**trl_rig.QUIET, "per_device_train_batch_size": 16, **options},
    )  # fmt: skip
    data = Dataset.from_list(rig.rows())
    return trl.GRPOTrainer(rig.llama(), rig.digit_count, args, train_dataset=data, processing_class=rig.tokenizer())


def hidden_and_targets(model, inputs):
    """States (S, C, D) of the rows before the completion tokens, and those tokens (S, C)."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    states = model.model(ids, attention_mask=mask).last_hidden_state
    return states[:, -inputs["completion_ids"].shape[1] - 1 : -1], inputs["completion_ids"]


def log_probs(model, inputs):
    states, targets = hidden_and_targets(model, inputs)
    return torch.log_softmax(model.lm_head(states) / TEMPERATURE, -1).gather(2, targets[..., None])[..., 0]


def denominator(loss_type: str, inputs) -> float:
    """What TRL divides a micro-batch by, on one process."""
    responses, tokens = len(inputs["completion_ids"]), inputs["completion_mask"].sum().item()
    return {
        **dict.fromkeys(("grpo", "sapo", "grpo, by sequence"), responses * ACCUMULATION),
        "bnpo": tokens * ACCUMULATION,
        "dr_grpo": responses * 10 * ACCUMULATION,  # max_completion_length
        "dapo": inputs["num_items_in_batch"].item() * ACCUMULATION / PER_GENERATION,
        "cispo": inputs["num_items_in_batch"].item() * ACCUMULATION / PER_GENERATION,
    }[loss_type]


def of_trl(folder, inputs, loss_type, beta, **options):
    # TRL caps the ratio of cispo at epsilon_high itself, not at 1 + epsilon_high.
    high = 1 + HIGH if loss_type == "cispo" else HIGH
    # By default TRL multiplies the KL by the ratio, which policy_loss does not.
    loss_type, *by_sequence = loss_type.split(", ")
    if by_sequence:
        options["importance_sampling_level"] = "sequence"
    trainer = grpo(folder, loss_type, epsilon=LOW, epsilon_high=high, use_bias_correction_kl=False, **options)
    trainer.beta = beta  # given to the config, it would load a second model by the name of the first
    trainer.args.steps_per_generation, trainer.current_gradient_accumulation_steps = PER_GENERATION, ACCUMULATION
    trainer.model.train()
    if "importance_sampling_ratio" in inputs:
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    loss = trainer._compute_loss(trainer.model, inputs)
    (UPSTREAM * loss).backward()
    return loss.item(), trainer.model, trainer._metrics["train"]


def of_policy_loss(inputs, loss_type, beta, **options):
    model = rig.llama()
    states, targets = hidden_and_targets(model, inputs)
    objective, reduction = COUNTERPART[loss_type]
    clip = {"clip_high": HIGH, "clip_low": LOW}
    if objective in ("cispo", "sapo"):
        clip = {"clip_high": HIGH} if objective == "cispo" else {}
    loss, stats = policy_loss(
        states, targets, weight=model.lm_head.weight, chunk_rows=32, objective=objective, reduction=reduction,
        advantages=inputs["advantages"], mask=inputs["completion_mask"].bool(),
        old_log_probs=inputs["old_per_token_logps"], ref_log_probs=inputs["ref_per_token_logps"], beta=beta,
        num_items_in_batch=denominator(loss_type, inputs), temperature=TEMPERATURE, return_stats=True, **clip,
        **options,
    )  # fmt: skip
    (UPSTREAM * loss).backward()
    return loss.item(), model, stats


@pytest.mark.parametrize("loss_type", COUNTERPART)
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_loss_and_gradients_are_trls(tmp_path, micro_batch, loss_type, beta):
    expected, theirs, metrics = of_trl(tmp_path, micro_batch, loss_type, beta)
    loss, ours, stats = of_policy_loss(micro_batch, loss_type, beta)
    assert loss == pytest.approx(expected, rel=1e-5, abs=1e-7)
    largest = max(p.grad.norm() for p in theirs.parameters())
    assert largest > 1e-2
    for (name, mine), its in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (mine.grad - its.grad).norm() <= 1e-5 * (its.grad.norm() + 0.05 * largest), name

    live = micro_batch["completion_mask"].bool()
    by_token = loss_type != "grpo, by sequence"  # a mean varies less
    for side in (stats.ratios[live] < 1 - LOW, stats.ratios[live] > 1 + HIGH):
        assert 0.1 * by_token <= side.float().mean() < 0.6  # on both sides of the clip
    if loss_type == "sapo":
        assert not stats.clipped.any()
        return
    assert 0.05 < stats.clipped[live].float().mean() < 0.9
    if loss_type != "cispo" and by_token:
        assert stats.clipped[live].float().mean().item() == pytest.approx(metrics["clip_ratio/region_mean"][0])
    if beta:
        assert stats.kl[live].mean().item() == pytest.approx(metrics["kl"][0], rel=1e-4)


def test_row_weights_are_trls_importance_sampling_correction(tmp_path, micro_batch):
    weights = torch.rand(micro_batch["completion_ids"].shape, generator=torch.Generator().manual_seed(3)) * 2
    weights[weights < 0.4] = 0.0
    expected, theirs, _ = of_trl(tmp_path, {**micro_batch, "importance_sampling_ratio": weights}, "dapo", 0.0)
    loss, ours, _ = of_policy_loss(micro_batch, "dapo", 0.0, weights=weights)
    assert loss == pytest.approx(expected, rel=1e-5)
    trl_rig.assert_same_gradients(ours, theirs, 1e-5, 1e-2)


def test_the_entropy_bonus_is_trls_where_the_token_mean_is(tmp_path, micro_batch):
    expected, theirs, _ = of_trl(tmp_path, micro_batch, "bnpo", 0.0, entropy_coef=0.2)
    loss, ours, _ = of_policy_loss(micro_batch, "bnpo", 0.0, entropy_coef=0.2)
    assert loss == pytest.approx(expected, rel=1e-5)
    trl_rig.assert_same_gradients(ours, theirs, 2e-5, 1e-2)


def test_without_old_log_probs_both_are_on_policy(tmp_path, micro_batch):
    on_policy = {name: value for name, value in micro_batch.items() if name != "old_per_token_logps"}
    expected, theirs, _ = of_trl(tmp_path, on_policy, "dapo", 0.0)
    loss, ours, _ = of_policy_loss({**on_policy, "old_per_token_logps": None}, "dapo", 0.0)
    assert loss == pytest.approx(expected, rel=1e-5)
    trl_rig.assert_same_gradients(ours, theirs, 1e-5, 1e-2)
