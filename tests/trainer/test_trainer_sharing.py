"""share_prompts: a step is the same whether a group's prompt is computed once or with every response."""

from __future__ import annotations

import logging

import pytest
import torch
import trainer_rig as rig
import transformers
from trainer_rig import step_gradients
from trainer_rig import trainer as made

from gft_kernels.data.rows import Response, Row
from gft_kernels.model import shared_prompts
from gft_kernels.model.shared_prompts import PROMPT_IDS
from gft_kernels.trainer.groups import Group

RATIO = {"objective": "grpo", "beta": 0.5, "steps_per_rollout": 2, "clip_low": 0.01}
CASES = {
    "demonstrations and samples": {},
    "the policy that sampled and the one it started from": RATIO,
    "groups that are cut": {"steps_per_rollout": 2, "rollout_order": "paper"},
    "truncated samples have no loss": {"mask_truncated_completions": True},
    "offline groups of different sizes": {"train": rig.offline_rows(11), "reward_funcs": (), "num_generations": 0},
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_same_with_prompts_computed_once(tmp_path, case):
    options = {"logging_steps": 1, **CASES[case]}
    rows = options.pop("train", rig.rows(11))
    whole, losses = step_gradients(tmp_path, rows, 3, 2, share_prompts=False, **options)
    shared, shared_losses = step_gradients(tmp_path, rows, 3, 2, share_prompts=True, **options)
    assert len(whole) == len(shared) == 2
    assert shared_losses == pytest.approx(losses, rel=1e-4, abs=1e-7)
    for ours, theirs in zip(shared, whole, strict=True):
        assert not torch.equal(ours, theirs)  # the prompts were computed in another way
        assert theirs.norm() > 1e-2 and (ours - theirs).norm() <= 2e-5 * theirs.norm()


def test_metrics_are_the_same(tmp_path, monkeypatch):
    lines, trials = [], []
    monkeypatch.setattr(shared_prompts, "refusal_of_trial", lambda *given: trials.append(given))
    for shares in (True, False):
        trainer = made(tmp_path, log_kl=True, steps_per_rollout=2, share_prompts=shares)
        trainer.train()
        line = trainer.state.log_history[1]
        lines.append({name: v for name, v in line.items() if "per_second" not in name})
    assert lines[0].keys() == lines[1].keys() and lines[0]["drift/kl"] > 0
    assert lines[0] == pytest.approx(lines[1], rel=1e-3, abs=1e-8)
    assert len(trials) == 1  # neither at the first step again, nor of the frozen copy


def group(prompt: int, *responses: int) -> Group:
    return Group(Row("", list(range(prompt)), []), [Response("", list(range(n)), "expert") for n in responses])


def test_auto_counts_the_tokens(tmp_path, caplog):
    trainer = made(tmp_path)
    assert trainer.sharing.reason is None
    with caplog.at_level(logging.WARNING):
        assert trainer.sharing.applies([group(20, 4, 4), group(20, 4)])  # 40 + 12 of 72 tokens
        assert not caplog.records
        assert not trainer.sharing.applies([group(20, 4), group(20, 4)])  # nothing is repeated
        assert not trainer.sharing.applies([group(4, 40, 2), group(40, 2)])  # padding to the longest of both
        assert not trainer.sharing.applies([Group(Row("", [], []), [])])
    assert len(caplog.records) == 1 and "a micro-batch of 48 tokens would be one of 48" in caplog.text
    window, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    assert f"gft_{PROMPT_IDS}" in window[0]
    assert made(tmp_path, share_prompts=True).sharing.applies([group(20, 4)])
    assert not made(tmp_path, share_prompts=False).sharing.applies([group(20, 4, 4)])


def mistral():
    options = rig.llama().config.to_dict() | {"sliding_window": 6, "architectures": None, "model_type": "mistral"}
    return transformers.MistralForCausalLM(transformers.MistralConfig(**options))


REASONS = {
    "a sliding window": ({}, mistral, "DynamicSlidingWindowLayer"),
    "dropout": ({}, rig.gpt2, "draws at random for each row in training (transformer.drop.p = 0.1)"),
    "gradient checkpointing": ({"gradient_checkpointing": True}, rig.llama, "gradient checkpointing"),
    "noise": ({"neftune_noise_alpha": 0.5}, rig.llama, "neftune_noise_alpha"),
}


@pytest.mark.parametrize("case", REASONS)
def test_what_cannot_be_shared_is_said_once_and_refused_where_it_is_asked_for(tmp_path, caplog, case):
    options, model, reason = REASONS[case]
    with caplog.at_level(logging.WARNING, "gft_kernels"):
        trainer = made(tmp_path, model(), **options)
    told = [record.getMessage() for record in caplog.records if record.name.startswith("gft_kernels")]
    assert [reason in line for line in told] == [True]
    assert trainer.rollout.shape["share_prompts"] == (case != "a sliding window")  # sampling draws no noise
    trainer.train()  # of whole rows
    with pytest.raises(ValueError, match="share_prompts must be 'auto' or False here, got True; ") as refusal:
        made(tmp_path, model(), share_prompts=True, **options)
    assert reason in str(refusal.value)
