"""Objectives beside GFT, and several optimizer steps on one rollout: the policies that sampled and started."""

from __future__ import annotations

import copy
import math

import oracle
import pytest
import torch
import trainer_rig as rig

from gft_kernels import policy_loss
from gft_kernels.trainer import GFTConfig, GFTTrainer
from gft_kernels.trainer.config import clip_range
from gft_kernels.trainer.groups import IGNORE, SOURCES

OFFLINE = {"train": rig.offline_rows(6), "reward_funcs": (), "num_generations": 0, "share_prompts": False}


def log_pi(model, trainer, inputs):
    """(S, T) float64: log pi of every target in a plain forward of all logits, at the trainer's temperature."""
    with torch.no_grad():
        logits = copy.deepcopy(model).double()(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    width = inputs["targets"].shape[1]
    logits = logits[:, -width - 1 : -1] / trainer.args.temperature
    return logits.log_softmax(-1).gather(-1, inputs["targets"].clamp(min=0)[..., None])[..., 0]


def window(trainer, micro_batches=2):
    return trainer.get_batch_samples(iter(trainer.get_train_dataloader()), micro_batches, torch.device("cpu"))


CLIPS = {"grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "dr_grpo": (0.2, 0.2), "cispo": (1.0, 4.0)}
CASES = [
    ("gft", {"tau": 0.3}), ("gft", {"tau": 0.3, "beta": 0.7, "kl_estimator": "k2"}),
    ("grpo", {"clip_low": 0.05, "clip_high": 0.1, "beta": 0.4, "entropy_coef": 0.02}), ("dapo", {"beta": 0.1}),
    ("dapo", {"clip_high": 0.1, "beta": 0.7, "delta": 1.25, "kl_cap": 0.05}), ("dr_grpo", {}),
    ("cispo", {"clip_high": 0.05, "entropy_coef": 0.1}),
]  # fmt: skip


@pytest.mark.parametrize(("objective", "options"), CASES, ids=str)
def test_a_step_is_the_objective_of_the_policies_that_sampled_and_started(tmp_path, objective, options):
    """Loss and gradient against the float64 oracle, after the weights have moved away from both other policies."""
    trainer = rig.trainer(
        tmp_path, rig.gpt2(dropout=0.1), objective=objective, steps_per_rollout=2, temperature=1.2, max_steps=4,
        gradient_accumulation_steps=2, per_device_train_batch_size=2, **OFFLINE, **options,
    )  # fmt: skip
    trainer.state.max_steps = 4
    micro_batches, num_items = window(trainer)
    inputs = micro_batches[0]
    shaken(trainer.model)
    trainer.model.eval()  # with dropout there is nothing to compare with
    loss = trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=num_items)
    loss.backward()
    gradient = trainer.model.transformer.wte.weight.grad.clone()

    start = rig.gpt2(dropout=0.0)
    sampled = ref = log_pi(start, trainer, inputs)
    wide = copy.deepcopy(trainer.model).double()
    wide.zero_grad()
    live = inputs["targets"] != IGNORE
    logits = wide(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    logits = logits[:, -live.shape[1] - 1 : -1][live]
    rows = torch.arange(len(live))[:, None].expand_as(live)[live]
    clips = dict(zip(("clip_low", "clip_high"), CLIPS.get(objective, ()), strict=False))
    losses = oracle.policy_losses(
        logits, inputs["targets"][live], torch.ones(len(rows)), inputs["advantages"][rows].double(),
        objective=objective, old=sampled[live], ref=ref[live], temperature=1.2, **{**clips, **options},
    )  # fmt: skip
    if "delta" in options:  # both bounds act
        apart = log_pi(trainer.model, trainer, inputs)[live] - sampled[live]
        assert ((apart.exp() > 1.25) & (inputs["advantages"][rows] < 0)).any() and (apart < -0.05).any()
    if trainer.args.reduction == "sequence-mean":
        losses = losses / live.sum(1)[rows]
    expected = losses.sum() / items(trainer, objective)
    expected.backward()
    assert expected.abs() > 1e-4
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    theirs = wide.transformer.wte.weight.grad
    assert (gradient.double() - theirs).norm() < 1e-4 * theirs.norm()


def shaken(model) -> None:
    """Other weights, as after a step."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)


def items(trainer, objective) -> int:
    """The denominator of the first four groups, from the definitions."""
    responses = [text for row in rig.offline_rows(4) for text in row["responses"]]
    if objective == "dr_grpo":
        return len(responses) * trainer.args.max_completion_length
    return len(responses) if objective == "grpo" else sum(len(text) + 1 for text in responses)


def test_dr_grpo_divides_by_no_deviation(tmp_path):
    assert rig.config(tmp_path, objective="dr_grpo").normalize == "mean"
    assert rig.config(tmp_path, objective="dr_grpo", normalize="std").normalize == "std"
    assert rig.config(tmp_path).normalize == "std"


def run(tmp_path, **options):
    torch.manual_seed(0)
    rollouts, asked = [], []

    def rollout(model, prompts_ids, sampling):
        asked.append(len(prompts_ids))
        rollouts.append(next(model.parameters()).detach().clone())
        generator = torch.Generator().manual_seed(len(asked))
        length = len(prompts_ids) * sampling.num_generations
        return [[*torch.randint(2, 12, (1 + i % 4,), generator=generator).tolist(), 1] for i in range(length)]

    options = {"max_steps": 5, "learning_rate": 3e-2, **options}
    lines = rig.trained(rig.trainer(tmp_path, train=rig.rows(20), rollout_fn=rollout, **options))
    return lines, asked, rollouts


def test_a_rollout_serves_several_steps_and_ends_with_the_run(tmp_path):
    lines, asked, weights = run(tmp_path, steps_per_rollout=2, gradient_accumulation_steps=2, max_steps=3)
    assert asked == [8, 4]  # two steps of 2×2 prompts at once; only one step is left for the last
    assert len(lines) == 3
    assert not torch.equal(weights[0], weights[1])


def test_in_the_papers_order_samples_come_first_and_groups_are_split(tmp_path):
    """Two prompts of 3 given and 2 sampled responses a step, three steps a rollout: 12 samples, then 18 given."""
    options = {"num_generations": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    found = {}
    for order in ("groups", "paper"):
        three = [{**row, "demonstrations": [*row["demonstrations"], "0."]} for row in rig.rows(6)]
        trainer = rig.trainer(
            tmp_path, rig.gpt2(dropout=0.0), three, steps_per_rollout=3, max_steps=3, rollout_order=order,
            num_demonstrations=3, **options,
        )  # fmt: skip
        trainer.state.max_steps = 3
        iterator = iter(trainer.get_train_dataloader())
        steps = [trainer.get_batch_samples(iterator, 2, torch.device("cpu")) for _ in range(3)]
        found[order] = steps
        assert not trainer._ahead
        for _ in range(2):  # an epoch that was broken off has left nothing
            batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, torch.device("cpu"))
            assert torch.equal(batches[0]["input_ids"], steps[0][0][0]["input_ids"])
    sources = [[inputs["sources"].tolist() for inputs in batches] for batches, _ in found["paper"]]
    assert sources == [[[2] * 5, [2] * 5], [[2] * 2 + [0, 1, 1], [0, 1, 1, 0, 1]], [[1, 0, 1, 1, 0], [1, 1, 0, 1, 1]]]
    for steps in found.values():  # the same responses with the same weights, each step over its own tokens
        for batches, count in steps:
            assert count == sum((inputs["targets"] != IGNORE).sum() for inputs in batches)
    weights = {
        order: sorted(a for batches, _ in steps for inputs in batches for a in inputs["advantages"].tolist())
        for order, steps in found.items()
    }
    assert weights["paper"] == weights["groups"] and len(weights["paper"]) == 30
    with pytest.raises(ValueError, match="steps_per_rollout must be above 1 with rollout_order 'paper', got 1"):
        rig.config(tmp_path, rollout_order="paper")


def test_drift_is_nothing_in_the_first_step_of_a_rollout_and_grows_in_it(tmp_path):
    lines, _, _ = run(tmp_path, steps_per_rollout=4, max_steps=8, objective="dapo", clip_high=0.01)
    kl = [line["drift/kl"] for line in lines]
    largest = [line["drift/max_abs_log_ratio"] for line in lines]
    for first in (0, 4):
        assert kl[first] == pytest.approx(0, abs=1e-9) and largest[first] < 1e-5
        assert 0 < kl[first + 1] < kl[first + 3] and largest[first + 3] > 1e-2
        assert lines[first]["drift/outside_clip"] == 0 < lines[first + 3]["drift/outside_clip"] <= 1
        assert lines[first + 3]["drift/mean_abs_log_ratio"] < largest[first + 3]
    assert any(line["clipped"] > 0 for line in lines) and "rectified" not in lines[0]


def test_drift_is_that_of_the_tokens(tmp_path):
    """Means, largest and fraction of one step, from plain forwards of the model before and after it moved."""
    trainer = rig.trainer(tmp_path, rig.gpt2(dropout=0.2), steps_per_rollout=2, num_generations=2, train=rig.rows(8))
    trainer.state.max_steps = 2
    micro_batches, num_items = window(trainer, 1)
    inputs = micro_batches[0]
    shaken(trainer.model)
    trainer.compute_loss(trainer.model.eval(), dict(inputs), num_items_in_batch=num_items)
    line = trainer.means.drain(trainer.accelerator, 1.0)
    live = inputs["targets"] != IGNORE
    before, after = (log_pi(m, trainer, inputs) for m in (rig.gpt2(dropout=0.0), trainer.model))
    log_ratio = (after - before)[live]
    assert line["drift/mean_abs_log_ratio"] == pytest.approx(log_ratio.abs().mean().item(), rel=1e-3)
    assert line["drift/max_abs_log_ratio"] == pytest.approx(log_ratio.abs().max().item(), rel=1e-3)
    outside = (log_ratio.exp() - 1).abs() > 0.2
    assert line["drift/outside_clip"] == pytest.approx(outside.double().mean().item(), abs=1e-9)
    assert 0 < line["drift/outside_clip"] < 1
    sampled = (live & (inputs["sources"] == 2)[:, None])[live]
    kl = (log_ratio.exp() - 1 - log_ratio)[sampled].mean()
    assert line["drift/kl"] == pytest.approx(kl.item(), rel=1e-3)
    assert line["min_log_prob"] == pytest.approx(after[live].min().item(), rel=1e-4)


@pytest.mark.parametrize(("options", "bounds"), [
    ({}, (0.8, 1.2)), ({"objective": "sapo"}, (0.8, 1.2)), ({"objective": "grpo", "clip_high": 0.3}, (0.8, 1.3)),
    ({"objective": "psft", "advantages": "ones", "num_generations": 0}, (0.0, 1.28)),
    ({"objective": "gmpo", "clip_low": 0.3}, (math.exp(-0.3), math.exp(0.4))),
    ({"objective": "dapo", "given_objective": "luffy"}, (0.8, 1.28)),
    ({"objective": "gft", "given_objective": "grpo"}, (0.8, 1.2)),
    ({"objective": "grpo", "given_objective": "psft"}, (0.8, 1.2)),
    ({"objective": "dapo", "given_objective": "chord", "clip_low": 0.1, "clip_high": 0.5}, (0.9, 1.5)),
])  # fmt: skip
def test_drift_is_counted_outside_the_bounds_of_the_objective_that_clips(tmp_path, options, bounds):
    assert clip_range(rig.config(tmp_path, **options)) == pytest.approx(bounds)


def test_one_step_a_rollout_asks_nothing_of_the_old_policy(tmp_path):
    """On-policy the ratio is 1 by definition: no second forward, and no drift to report."""
    lines, _, _ = run(tmp_path, objective="grpo", max_steps=2)
    assert not any(name.startswith("drift/") for line in lines for name in line)
    assert all(line["clipped"] == 0 for line in lines)


def test_the_penalty_holds_the_policy_to_where_it_started(tmp_path):
    ends = []
    for beta in (0.0, 5.0):
        lines, _, _ = run(tmp_path, objective="grpo", beta=beta, log_kl=True, max_steps=12, seed=3)
        ends.append(lines[-1]["kl_to_start"])
    assert ends[1] < 0.5 * ends[0]


def test_gft_then_grpo(tmp_path):
    """The weights of one run start the next, under another objective."""
    first = rig.trainer(tmp_path / "gft", rig.llama(), objective="gft", tau=0.5)
    first.train()
    first.model.bfloat16().save_pretrained(tmp_path / "gft")
    rig.tokenizer().save_pretrained(tmp_path / "gft")
    args = rig.config(tmp_path / "grpo", objective="grpo", num_demonstrations=0, num_generations=4, steps_per_rollout=2)
    second = GFTTrainer(str(tmp_path / "gft"), args, rig.rows(), reward_funcs=rig.digit_count)
    assert second.model.dtype == torch.float32  # an update of 1e-6 would be lost in bfloat16
    lines = rig.trained(second)
    assert len(lines) == 2 and all(math.isfinite(line["loss"]) for line in lines)
    assert "reward/expert" not in lines[0] and lines[1]["drift/kl"] > 0


def test_defaults_are_those_of_policy_loss(tmp_path):
    for objective, reduction, chosen in (
        ("gft", "token-mean", (0.7, "all", None, None)),
        ("grpo", "sequence-mean", (None, None, 0.2, 0.2)),
        ("dapo", "token-mean", (None, None, 0.2, 0.28)),
        ("cispo", "token-mean", (None, None, 1.0, 4.0)),
    ):
        config = GFTConfig(output_dir=str(tmp_path), objective=objective)
        assert config.reduction == reduction
        assert (config.tau, config.rectify, config.clip_low, config.clip_high) == chosen


def test_the_patched_model_leaves_out_what_it_is_told(tmp_path):
    model = rig.trainer(tmp_path, filter_eps=5e-4, backend="reference").model
    assert (model._gft_forward.options["filter_eps"], model._gft_forward.options["backend"]) == (5e-4, "reference")


MIXED = {
    "luffy": {"objective": "grpo", "given_objective": "luffy", "gamma": 0.3, "given_weight": 0.5},
    "chord": {"objective": "dapo", "given_objective": "chord", "clip_high": 0.1},
    "rectified": {"objective": "gft", "rectify": "given", "tau": 0.9},
}


@pytest.mark.parametrize("mixture", MIXED)
def test_demonstrations_have_their_own_objective_and_weight(tmp_path, mixture):
    options = dict(MIXED[mixture])
    trainer = rig.trainer(
        tmp_path, rig.gpt2(dropout=0.0), num_generations=2, max_steps=1, share_prompts=False, **options
    )
    trainer.state.max_steps = 1
    (inputs, *_), _ = window(trainer)
    given = inputs["sources"] != SOURCES.index("sampled")
    assert given.any() and not given.all()
    shaken(trainer.model)
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=torch.tensor(7.0))
    logits = copy.deepcopy(trainer.model)(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    weight = options.pop("given_weight", 1.0)
    advantages = torch.where(given, 1.0, inputs["advantages"]) if mixture == "chord" else inputs["advantages"]
    old = {"old_log_probs": inputs["old_log_probs"]} if "old_log_probs" in inputs and mixture != "rectified" else {}
    expected = policy_loss(
        logits[:, -inputs["targets"].shape[1] - 1 : -1], inputs["targets"], advantages=advantages, given=given,
        weights=torch.where(given, weight, 1.0), num_items_in_batch=7.0, **old, **options,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
