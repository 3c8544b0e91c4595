"""What `policy_loss` refuses and defaults to, and what autograd and torch.compile ask of it."""

from __future__ import annotations

import pytest
import torch
from cases import assert_refused
from policy_cases import OBJECTIVES, PENALTIES, problem

from gft_kernels import policy_loss
from gft_kernels.operators import row

LOGITS, TARGETS = torch.randn(4, 3, 7), torch.zeros(4, 3, dtype=torch.long)
LOG_PROBS, ADVANTAGES = torch.zeros(4, 3), torch.ones(4)
HEAD = {"inputs": torch.randn(4, 3, 5), "weight": torch.randn(7, 5)}

REFUSED = {
    ValueError: [
        ("objective must be one of gft, sft, dft, .*, grpo, .*got 'ppo'", dict(objective="ppo")),
        ("tau must be left out with objective='grpo', got 0.5; gft use", dict(objective="grpo", tau=0.5)),
        ("rectify must be left out with objective='dft'", dict(objective="dft", rectify="all")),
        ("clip_low must be left out with objective='psft'", dict(objective="psft", clip_low=0.2)),
        ("given_objective must be one of .*got 'ppo'", dict(objective="grpo", given_objective="ppo")),
        ("given must be left out without given_objective, got a tensor", dict(given=ADVANTAGES > 0)),
        ("given must be given with given_objective or rectify", dict(rectify="given")),
        (r"given must have shape \(4, 3\) or one entry per response, got \(3,\)",
         dict(rectify="given", given=torch.ones(3, dtype=torch.bool))),
        ("gamma must be left out with objective='grpo' and given_objective='chord', got 0.1; gft, luffy use it",
         dict(objective="grpo", given_objective="chord", given=ADVANTAGES > 0, gamma=0.1)),
        ("advantages must be given with given_objective='sft', got rewards; ",
         dict(objective="grpo", given_objective="sft", given=ADVANTAGES > 0, rewards=ADVANTAGES, group_size=2)),
        ("sequence_ids must be given for packed rows with objective='gspo', got None",
         dict(objective="gspo", inputs=LOGITS.flatten(0, 1), targets=TARGETS.flatten(), reduction="sum")),
        ("given_objective must have no ratio beside objective='gmpo', got 'psft'",
         dict(objective="gmpo", given_objective="psft", given=ADVANTAGES > 0, advantages=ADVANTAGES)),
        ("beta must be positive with objective 'asft', got 0; without", dict(objective="asft")),
        ("gamma must be left out with rectify='all', got 0.1", dict(gamma=0.1)),
        ("gamma must be finite and positive, got 0.0", dict(objective="luffy", gamma=0.0)),
        (r"weights must have shape \(4, 3\) or \(4,\), got", dict(weights=ADVANTAGES[:3])),
        ("clip_high must be left out with objective='gft', got 0.2; psft, grpo, ", dict(clip_high=0.2)),
        ("old_log_probs must be left out .*'gft', got a tensor", dict(old_log_probs=LOG_PROBS)),
        ("advantages must be left out with objective='sft'", dict(objective="sft", advantages=ADVANTAGES)),
        ("rewards must be left out .*tau=1 weighs", dict(objective="dft", rewards=ADVANTAGES, group_size=2)),
        (r"clip_low must lie in \[0, 1\], got -0.1", dict(objective="grpo", clip_low=-0.1)),
        (r"clip_low must lie in \[0, 1\], got 1.1", dict(objective="grpo", clip_low=1.1)),
        ("clip_high must be finite", dict(objective="grpo", clip_high=float("inf"))),
        ("delta must be left out with objective='cispo', got 9.0; grpo, bnpo, dapo, dr_grpo use it",
         dict(objective="cispo", delta=9.0)),
        (r"delta must be finite and above 1 \+ clip_high = 1.28, got 1.28", dict(objective="dapo", delta=1.28)),
        ("delta must be finite and above", dict(objective="grpo", delta=float("inf"))),
        ("kl_cap must be left out with beta=0, got 2; there is no penalty", dict(kl_cap=2.0)),
        ("kl_estimator must be left out with beta=0, got 'k2'; there is no penalty", dict(kl_estimator="k2")),
        ("kl_estimator must be one of k1, k2, k3, got 'k4'",
         dict(beta=0.1, ref_log_probs=LOG_PROBS, kl_estimator="k4")),
        ("kl_cap must be left out with kl_estimator='k1', got 2; its pull is beta everywhere",
         dict(beta=0.1, ref_log_probs=LOG_PROBS, kl_estimator="k1", kl_cap=2.0)),
        ("kl_cap must be finite and positive, got 0.0; None is no cap",
         dict(beta=0.1, ref_log_probs=LOG_PROBS, kl_cap=0.0)),
        ("beta must be finite and not negative, got -1.0", dict(beta=-1.0, ref_log_probs=LOG_PROBS)),
        ("entropy_coef must be finite, got nan", dict(entropy_coef=float("nan"))),
        ("ref_log_probs must be given with beta=0.1, got None", dict(beta=0.1)),
        ("ref_log_probs must be left out with beta=0", dict(ref_log_probs=LOG_PROBS)),
        (r"old_log_probs must have shape \(4, 3\), got", dict(objective="grpo", old_log_probs=LOG_PROBS[0])),
        ("num_items_in_batch must be given with objective='dr_grpo'", dict(objective="dr_grpo")),
        ("inplace must be False with weight", dict(**HEAD, inplace=True)),
        ("bias must be left out without weight, got a tensor", dict(bias=torch.zeros(7))),
        ("chunk_rows must be left out without weight, got 3", dict(chunk_rows=3)),
        ("filter_eps must be left out without weight, got 'auto'", dict(filter_eps="auto")),
        ("accum_dtype must be left out without weight", dict(accum_dtype=torch.float32)),
    ],
    TypeError: [
        ("given must be bool, got torch.float32", dict(rectify="given", given=ADVANTAGES)),
        ("old_log_probs must be floating point, got torch.int64", dict(objective="grpo", old_log_probs=TARGETS)),
        ("old_log_probs must be a torch.Tensor", dict(objective="grpo", old_log_probs=0.0)),
        ("targets must be a torch.Tensor, got list", dict(targets=[1])),
    ],
}  # fmt: skip


CASES = [(error, *case) for error, cases in REFUSED.items() for case in cases]


@pytest.mark.parametrize(("error", "sentence", "given"), CASES, ids=[sentence for _, sentence, _ in CASES])
def test_what_is_refused_says_what_to_do(error, sentence, given):
    call = {"inputs": LOGITS, "targets": TARGETS, **given}
    assert_refused(error, sentence, lambda: policy_loss(**call))


DEFAULTS = {
    "gft": {"tau": 0.7, "rectify": "all", "reduction": "token-mean"},
    "sft": {"reduction": "token-mean"},
    "dft": {"reduction": "token-mean"},
    "grpo": {"clip_low": 0.2, "clip_high": 0.2, "delta": None, "reduction": "sequence-mean"},
    "dapo": {"clip_low": 0.2, "clip_high": 0.28, "reduction": "token-mean"},
    "dr_grpo": {"clip_low": 0.2, "clip_high": 0.2, "reduction": "token-mean", "num_items_in_batch": 30},
    "cispo": {"clip_low": 1.0, "clip_high": 4.0, "reduction": "token-mean"},
    "bnpo": {"clip_low": 0.2, "clip_high": 0.2, "delta": None, "reduction": "token-mean"},
    "sapo": {"gate_positive": 1.0, "gate_negative": 1.05, "reduction": "sequence-mean"},
    "psft": {"clip_high": 0.28, "reduction": "token-mean"},
    "luffy": {"gamma": 0.1, "reduction": "token-mean"},
    "chord": {"reduction": "token-mean"},
    "eaft": {"entropy_power": 1.0, "reduction": "token-mean"},
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_defaults(objective):
    """Left out or spelt out, to the bit; a different range or reduction is a different loss."""
    case = problem(objective)
    case.old = case.old * 3
    given = {k: v for k, v in case.arguments().items() if k in ("objective", "mask", "advantages", "old_log_probs")}
    needed = {k: v for k, v in DEFAULTS[objective].items() if k == "num_items_in_batch"}
    short = policy_loss(case.logits, case.targets, **given, **needed)
    assert torch.equal(short, policy_loss(case.logits, case.targets, **given, **DEFAULTS[objective]))
    others = {"tau": 0.1, "clip_high": 0.01, "reduction": "sum", "gamma": 0.3, "gate_positive": 2.0}
    others["entropy_power"] = 3.0
    for name in others.keys() & DEFAULTS[objective].keys():
        changed = {**DEFAULTS[objective], name: others[name]}
        if changed["reduction"] == "sum":
            changed.pop("num_items_in_batch", None)
        assert not torch.equal(short, policy_loss(case.logits, case.targets, **given, **changed)), name


def test_log_probs_of_other_floating_types_are_taken_and_detached():
    case = problem("grpo", beta=0.1)
    expected = case.loss()
    case.old, case.ref = case.old.double().requires_grad_(), case.ref.double().requires_grad_()
    loss = case.loss()
    assert torch.equal(loss, expected) and not loss.requires_grad


def test_a_reference_without_beta_is_only_looked_at():
    case = problem("dapo")
    loss, stats = case.loss(ref_log_probs=case.ref, return_stats=True)
    assert torch.equal(loss, case.loss()) and stats.kl[case.mask].gt(0).all()


def test_a_frozen_policy_needs_no_gradient():
    case = problem("cispo", **PENALTIES)
    assert not case.loss().requires_grad and torch.equal(case.loss(), case.run()[0])


def test_over_a_head_it_compiles_without_a_graph_break():
    torch._dynamo.reset()
    case, inputs, head = problem("grpo", 2, 3, 31, **PENALTIES), torch.randn(2, 3, 5), torch.randn(31, 5)

    def step(x):
        loss, stats = case.loss(x * 2, return_stats=True, weight=head)
        return loss * 0.5, stats.ratios, stats.clipped, stats.kl

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = inputs.clone().requires_grad_(True)
        loss, *stats = function(leaf)
        loss.backward()
        results.append((loss.detach(), *stats, leaf.grad))
    torch.testing.assert_close(results[1], results[0])


def test_opcheck(monkeypatch):
    captured, pack, case = [], row._pack, problem("dapo", 2, 3, 31, **PENALTIES)
    with monkeypatch.context() as patched:
        patched.setattr(row, "is_watched", lambda *inputs: True)
        patched.setattr(row, "_pack", lambda *call: captured.append(pack(*call)) or captured[-1])
        case.loss(case.logits.requires_grad_(True), backend="reference")
    torch.library.opcheck(torch.ops.gft.row_loss.default, (case.logits, *captured[0]))
