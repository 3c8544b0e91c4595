"""The benchmark harness: it times no wrong answer, takes turns, and its statistics are right."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from benchmarks.clocks import CpuClock
from benchmarks.harness import Absent, Answer, Contender, check, measure, quantile
from benchmarks.peers import row_contender, row_contenders
from benchmarks.row_losses import lean_loss, step_of
from benchmarks.row_problem import IGNORE_INDEX, build_row_problem
from benchmarks.shapes import RowCase

SMALL = RowCase(rows=12, vocab=257, responses=4)
DEAD = ("none", "masked", "zero-advantage")


class CountingClock:
    """Hands out set durations instead of measuring, and counts the steps it was asked for."""

    name = "counting"

    def __init__(self, seconds: dict[str, float]):
        self.seconds, self.steps = seconds, []

    def arm(self, step):
        return step

    def time(self, step) -> float:
        self.steps.append(step())
        return self.seconds[self.steps[-1]]


class NamedProblem:
    """A problem without inputs, for floors alone."""

    limit, timed_upstream = 0.1, 1.0

    def prepare(self, upstream: float) -> None: ...

    def deviation(self, answer, objective):
        raise AssertionError("floors are not checked")


def floor(name: str) -> Contender:
    return Contender(name, lambda: name, objective=None)


# ---- wrong answers


@pytest.mark.parametrize("dead", DEAD)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_answers_pass(dead, dtype):
    problem = build_row_problem(replace(SMALL, dead=dead, dtype=dtype, temperature=0.8))
    for name in ("gft_loss reference", "gft_loss cpu, in place", "eager PyTorch, lean", "F.cross_entropy"):
        outcome = check(problem, row_contender(problem, name))
        assert outcome.status in ("ready", "absent"), f"{name}: {outcome.why}"


def spoiled(problem, spoil) -> Contender:
    """The lean loss with its gradient spoiled afterwards."""
    step = step_of(lean_loss, problem)

    def wrong() -> Answer:
        answer = step()
        return Answer(answer.loss, (spoil(answer.gradients[0].clone()),))

    return Contender("spoiled", wrong)


def one_nan(gradient_NV):
    gradient_NV[3, 5] = math.nan
    return gradient_NV


def one_row_doubled(gradient_NV):
    gradient_NV[gradient_NV.norm(dim=1).argmax()] *= 2
    return gradient_NV


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spoil", [one_nan, one_row_doubled, torch.zeros_like, torch.neg, lambda g: g / 1.7])
def test_wrong_gradient_is_never_timed(spoil, dtype):
    problem = build_row_problem(replace(SMALL, dtype=dtype))
    clock = CountingClock({})
    (outcome,) = measure(problem, [spoiled(problem, spoil)], clock, rounds=3)
    assert outcome.status == "wrong answer" and "not timed" in outcome.why
    assert outcome.samples_s == [] and outcome.median_s is None and clock.steps == []


def test_wrong_loss_is_never_timed():
    problem = build_row_problem(SMALL)
    step = step_of(lean_loss, problem)
    shifted = Contender("shifted", lambda: Answer((a := step()).loss + 0.1, a.gradients))
    assert check(problem, shifted).status == "wrong answer"


def test_gradient_in_a_dead_row_is_wrong():
    problem = build_row_problem(replace(SMALL, dead="masked"))
    dead = (problem.targets_N == IGNORE_INDEX).nonzero()[0, 0]

    def fill(gradient_NV):
        gradient_NV[dead] += 1e-2
        return gradient_NV

    assert check(problem, spoiled(problem, fill)).status == "wrong answer"


def test_dropping_the_upstream_gradient_is_wrong():
    problem = build_row_problem(SMALL)

    def step() -> Answer:
        logits_NV = problem.logits_NV.clone().requires_grad_()
        loss = lean_loss(logits_NV, problem)
        return Answer(loss.detach(), torch.autograd.grad(loss, logits_NV))

    assert check(problem, Contender("drops it", step)).status == "wrong answer"


def test_failing_and_absent_contenders_leave_a_sentence():
    problem = build_row_problem(SMALL)

    def fail():
        raise RuntimeError("no such kernel\nsecond line")

    outcomes = measure(
        problem, [Contender("fails", fail), Absent("absent", "not installed")], CpuClock(cold=False), rounds=1
    )
    assert [(o.status, o.why) for o in outcomes] == [
        ("failed", "RuntimeError: no such kernel"),
        ("absent", "not installed"),
    ]


def test_absent_peers_say_why_and_the_rest_is_not_failed():
    problem = build_row_problem(SMALL)
    absent = [entry for entry in row_contenders(problem) if isinstance(entry, Absent)]
    assert {entry.name for entry in absent} >= {"Liger cross-entropy", "Liger GRPO", "quack cross-entropy"}
    for entry in absent:
        assert len(entry.why.split()) > 4, f"{entry.name}: {entry.why!r} is no sentence"


# ---- timing and statistics


def test_quantiles():
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([1.0, 2.0], 0.5) == 1.5
    assert quantile([float(i) for i in range(11)], 0.1) == pytest.approx(1.0)
    assert quantile([5.0], 0.9) == 5.0
    with pytest.raises(ValueError, match="samples must not be empty"):
        quantile([], 0.5)


def test_contenders_take_turns_and_warm_up_is_dropped():
    clock = CountingClock({"a": 2.0, "b": 3.0})
    a, b = measure(NamedProblem(), [floor("a"), floor("b")], clock, rounds=4, warmup=2)
    assert len(clock.steps) == 2 * (2 + 4)
    assert all({clock.steps[i], clock.steps[i + 1]} == {"a", "b"} for i in range(0, 12, 2)), "a round without everyone"
    assert len({tuple(clock.steps[i : i + 2]) for i in range(0, 12, 2)}) == 2, "the order must change"
    assert a.samples_s == [2.0] * 4 and (a.median_s, a.over_floor) == (2.0, 1.0)
    assert (b.median_s, b.p10_s, b.p90_s, b.over_floor) == (3.0, 3.0, 3.0, 1.5)


def test_slow_contender_stops_after_its_budget():
    clock = CountingClock({"slow": 10.0, "fast": 1.0})
    slow, fast = measure(NamedProblem(), [floor("slow"), floor("fast")], clock, rounds=6, warmup=1, budget_s=25.0)
    assert len(slow.samples_s) == 2, "10 s of warm-up, then 10 s and 10 s, which passes 25 s"
    assert len(fast.samples_s) == 6 and fast.over_floor == 0.1


def test_logits_are_restored_before_every_step():
    problem = build_row_problem(SMALL)
    seen = []
    measure(problem, [Contender("spoils", lambda: seen.append(problem.logits_NV.clone()) or problem.logits_NV.zero_(),
                                None)], CpuClock(cold=False), rounds=2)  # fmt: skip
    assert len(seen) == 1 + 1 + 2, "checked, warmed up, timed twice"
    assert all(torch.equal(logits, problem.pristine_NV) for logits in seen)
