"""Warnings of a run that comes apart: each fires in a run that does, once, and none in a healthy one."""

from __future__ import annotations

import warnings

import pytest
import torch
import trainer_rig as rig

from gft_kernels.trainer.metrics import SIGNS, signs_of_collapse


def certain_llama():
    """A model that is nearly sure of each next token: low entropy to start from."""
    model = rig.untied_llama()
    model.lm_head.weight.data.mul_(3.0)
    return model


FLAGS = tuple(SIGNS)


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_healthy_run_shows_no_sign(tmp_path):
    lines = rig.trained(rig.trainer(tmp_path, max_steps=20, learning_rate=1e-2))
    assert lines[-1]["pi"] > 2 * lines[0]["pi"] and lines[-1]["entropy"] < lines[0]["entropy"]  # it learns
    assert all(line[name] == 0.0 for line in lines for name in FLAGS)


def test_entropy_that_blows_up(tmp_path):
    with pytest.warns(UserWarning, match="entropy must stay near where it started, got") as caught:
        options = {"advantages": "ones", "num_generations": 0, "lr_scheduler_type": "constant"}
        options |= {"entropy_coef": 20.0, "tau": 1.0, "max_steps": 24, "learning_rate": 2e-2}
        lines = rig.trained(rig.trainer(tmp_path, certain_llama(), **options))
    shown = [line["collapse/entropy"] for line in lines]
    assert shown[0] == 0.0 and shown[-1] == 1.0
    assert sum("entropy must" in str(w.message) for w in caught) == 1


def test_a_log_probability_that_runs_away(tmp_path):
    """tau = 0 pushes an unlikely token of a bad response as hard as any other; tau = 1 lets it go."""
    rows = [{"prompt": "1+1>", "responses": ["1+1=2.", "9" * 8], "rewards": [1.0, 0.0]}] * 4
    options = {"train": rows, "reward_funcs": (), "num_generations": 0, "max_steps": 30, "learning_rate": 0.3}
    told = "least log-probability of a response token must stay bounded, got -"
    with pytest.warns(UserWarning, match=told) as caught:
        wild = rig.trained(rig.trainer(tmp_path / "wild", tau=0.0, optim="sgd", max_grad_norm=0.0, **options))
    assert wild[0]["collapse/min_log_prob"] == 0.0 and wild[-1]["collapse/min_log_prob"] == 1.0
    assert wild[-1]["min_log_prob"] < -50
    assert sum("bounded" in str(w.message) for w in caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tame = rig.trained(rig.trainer(tmp_path / "tame", tau=1.0, optim="sgd", max_grad_norm=0.0, **options))
    assert tame[-1]["min_log_prob"] > -50


def test_groups_that_teach_nothing(tmp_path):
    def constant(prompts, completions, **columns):
        return [1.0] * len(completions)

    with pytest.warns(UserWarning, match="rewards must differ within groups") as caught:
        lines = rig.trained(rig.trainer(tmp_path, reward_funcs=constant, max_steps=5))
    assert [line["collapse/silent_groups"] for line in lines] == [0.0, 0.0, 1.0, 1.0, 1.0]
    assert sum("rewards must" in str(w.message) for w in caught) == 1


def test_a_sign_that_comes_back_is_told_again_and_needs_no_memory_but_the_history():
    history = [{"entropy": 1.0, "zero_std_groups": 0.0, "min_log_prob": -12.0}, {"eval_loss": 2.0}]
    told = []
    for entropy in (1.2, 2.6, 2.7, 2.0, 2.6):
        line = {"entropy": entropy, "zero_std_groups": 0.0, "min_log_prob": -30.0}
        flags, sentences = signs_of_collapse(history, line)
        line |= flags
        told.append(len(sentences))
        history.append(line)
    assert told == [0, 1, 0, 0, 1]


def test_only_what_a_line_tells_is_judged():
    assert signs_of_collapse([], {"loss": 1.0}) == ({}, [])
    assert set(signs_of_collapse([], {"zero_std_groups": 1.0})[0]) == {"collapse/silent_groups"}


def test_a_low_start_moves_the_bound(tmp_path):
    """A response that was hopeless to begin with is no runaway."""
    history = [{"min_log_prob": -45.0}]
    assert signs_of_collapse(history, {"min_log_prob": -60.0})[0]["collapse/min_log_prob"] == 0.0
    assert signs_of_collapse(history, {"min_log_prob": -71.0})[0]["collapse/min_log_prob"] == 1.0
    assert torch.finfo(torch.float32).tiny < 2.0 ** -(50 * 1.4427)  # still a probability in float32
