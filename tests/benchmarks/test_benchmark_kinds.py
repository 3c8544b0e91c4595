"""The benchmarks beside rows and heads: log-probabilities, advantages, shards, steps. Wrong answers are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import longest
from benchmarks.harness import Absent, Answer, Contender, check
from benchmarks.kinds import KINDS
from benchmarks.ranks import RanksError, measure_in_ranks
from benchmarks.shapes import AdvantageCase, LogProbCase, ShardCase, StepCase

STEP = StepCase(6, vocab=307, hidden=16, layers=1, heads=2, responses=4, threads=1)
CASES = {
    "log-probs": LogProbCase(24, 48, 311, temperature=0.8, dead="masked"),
    "advantages": AdvantageCase(48, 8, grouped_by="ids"),
    "step": STEP,
}
SERVED = {
    "log-probs": {"gft_kernels token_log_probs reference", "eager PyTorch, log-softmax", "eager PyTorch, logsumexp"},
    "advantages": {"gft_kernels group_advantages", "Python dictionary of groups"},
    "step": {"gft_linear_loss cpu", "gft_loss cpu, in place", "eager PyTorch, lean",
             "eager PyTorch, paper's formulation"},
}  # fmt: skip


def problem_of(kind: str, **changes):
    if kind == "step":
        pytest.importorskip("transformers")
    return KINDS[kind].build(replace(CASES[kind], **changes))


@pytest.mark.parametrize("kind", CASES)
def test_right_answers_pass_and_the_absent_say_why(kind):
    problem = problem_of(kind)
    ready = set()
    for contender in KINDS[kind].invite(problem, skip=["torch.compile"]):
        if isinstance(contender, Absent):
            assert len(contender.why.split()) > 4
            continue
        outcome = check(problem, contender)
        assert outcome.status in ("ready", "absent"), f"{contender.name}: {outcome.why}"
        ready |= {contender.name} if outcome.status == "ready" else set()
    assert ready >= {name for name in SERVED[kind] if "cpu" not in name}


@pytest.mark.parametrize("kind", ["log-probs", "advantages"])
@pytest.mark.parametrize("spoil", [lambda x: x * 1.01, lambda x: x.roll(1), lambda x: x + float("nan")])
def test_wrong_values_are_refused(kind, spoil):
    problem = problem_of(kind)
    right = KINDS[kind].contender(problem, next(name for name in SERVED[kind] if name.startswith("gft_")))
    wrong = Contender("spoiled", lambda: Answer(spoil(right.step().loss), ()), right.objective)
    assert check(problem, wrong).status == "wrong answer"


@pytest.mark.parametrize("at", range(3))
def test_a_step_with_one_wrong_gradient_is_refused(at):
    problem = problem_of("step")
    right = KINDS["step"].contender(problem, "eager PyTorch, lean")

    def wrong() -> Answer:
        answer = right.step()
        gradients = list(answer.gradients)
        gradients[at] = gradients[at] * 1.01
        return Answer(answer.loss, tuple(gradients))

    assert check(problem, Contender("spoiled", wrong)).status == "wrong answer"


def test_a_step_moves_the_weights_and_prepare_puts_them_back():
    problem = problem_of("step")
    step = KINDS["step"].contender(problem, "eager PyTorch, lean").step
    step()
    assert not torch.equal(problem.parameters()[0], problem.pristine[0])
    assert all(parameter.grad is None for parameter in problem.parameters()), "the next step's peak begins without them"
    problem.prepare(1.0)
    assert all(map(torch.equal, problem.parameters(), problem.pristine))


def test_both_sides_of_tau_occur_in_the_step():
    problem = problem_of("step", vocab=5003, hidden=64, tokens=32)
    with torch.no_grad():
        logits = problem.hidden_ND() @ problem.weight_VD.t()
    pi = logits.softmax(1).gather(1, problem.targets_N[:, None])
    assert (pi < problem.case.tau).any() and (pi > problem.case.tau).any()


def test_ranks_agree_and_answer_right():
    case = ShardCase(rows=12, vocab=258, responses=4)
    outcomes = measure_in_ranks("shards", case, rounds=2, only="", skip=["torch"], cold=False, budget_s=60.0)
    found = {outcome.name: outcome for outcome in outcomes}
    for name in ("floor: logits.mul_(c)", "gft_loss reference", "eager PyTorch, Megatron's way",
                 "eager PyTorch, logits gathered"):  # fmt: skip
        assert found[name].status == "timed" and len(found[name].samples_s) == 2, found[name].why
    assert found["gft_loss reference"].error < 1e-6


def test_ranks_that_fail_say_why():
    with pytest.raises(RanksError, match="vocab=259"):
        measure_in_ranks("shards", ShardCase(12, 259), rounds=1, only="", skip=[], cold=False, budget_s=60.0)


# ---- the longest sequence within a budget


def line(fixed: int, per_token: int):
    probes = []

    def peak(tokens: int) -> int:
        probes.append(tokens)
        return fixed + per_token * tokens

    return peak, probes


@pytest.mark.parametrize("fixed", [0, 3_000_000])
@pytest.mark.parametrize("per_token", [40, 1_000, 90_000])
def test_the_longest_length_that_fits_is_found_in_few_probes(fixed, per_token):
    peak, probes = line(fixed, per_token)
    budget = 10_000_000
    found = longest.longest(peak, budget)
    best = (budget - fixed) // per_token // longest.GRAIN * longest.GRAIN
    assert (1 - longest.CLOSE) * best - longest.GRAIN <= found.tokens <= best
    assert len(probes) <= longest.PROBES
    assert found.peaks == [(tokens, fixed + per_token * tokens) for tokens in sorted(probes)]


def test_steps_in_the_peak_are_no_trap():
    found = longest.longest(lambda tokens: 1_000 * (tokens // 100 * 100), 1_000_000)
    assert 970 <= found.tokens < 1_100


def test_nothing_fits():
    assert longest.longest(lambda tokens: 10**9, 10**6).tokens == 0
