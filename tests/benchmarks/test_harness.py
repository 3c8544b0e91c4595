"""The benchmark harness: it times no wrong answer, takes turns, and its statistics are right."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks import memory
from benchmarks.clocks import Clock, CpuClock
from benchmarks.harness import AbsentError, Answer, Contender, measure
from benchmarks.kinds import row
from benchmarks.kinds.row import RowCase

SMALL = RowCase(rows=12, vocab=257, responses=4)


class CountingClock(Clock):
    """Hands out set durations instead of measuring, and counts the steps it was asked for."""

    def __init__(self, seconds: dict[str, float]):
        self.seconds, self.steps = seconds, []

    def time(self, step) -> float:
        self.steps.append(step())
        return self.seconds[self.steps[-1]]


PROBLEM = SimpleNamespace(case=SimpleNamespace(upstream=1.0), prepare=lambda upstream: None)
"""Without inputs, for floors alone: they are not checked."""


def floor(name: str) -> Contender:
    return Contender(name, lambda: name, objective=None)


def test_failing_and_absent_contenders_leave_a_sentence():
    problem = row.build(SMALL)

    def fail():
        raise RuntimeError("no such kernel\nsecond line")

    def lack():
        raise AbsentError("not installed")

    contenders = [Contender("fails", fail), Contender("absent", lack)]
    failed, absent = measure(problem, contenders, CpuClock(cold=False), rounds=1)
    assert (failed.status, failed.why) == ("failed", "RuntimeError: no such kernel")
    assert (absent.status, absent.why) == ("absent", "not installed")


@pytest.mark.parametrize("where", ["prepare", "deviation"])
def test_who_leaves_no_memory_to_check_him_fails_alone(monkeypatch, where):
    """Or a GPU that answers nothing more: inputs and truth are computed there too."""
    problem = row.build(SMALL)

    def fail(*_arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(problem), where, fail)
    contender = Contender("greedy", row.step_of(row.lean_loss, problem))
    (outcome,) = measure(problem, [contender], CpuClock(cold=False), rounds=1)
    assert (outcome.status, outcome.why) == ("failed", "OutOfMemoryError: CUDA out of memory")


def test_what_is_wrong_is_never_timed():
    problem, clock = row.build(SMALL), CountingClock({})
    step = row.step_of(row.lean_loss, problem)
    shifted = Contender("shifted", lambda: Answer((answer := step()).loss + 0.1, answer.gradients))
    (outcome,) = measure(problem, [shifted], clock, rounds=3)
    assert outcome.status == "wrong answer" and "not timed" in outcome.why
    assert outcome.rounds == 0 and outcome.median_s is None and clock.steps == []


# ---- timing and statistics


def test_contenders_take_turns_and_warm_up_is_dropped():
    clock = CountingClock({"a": 2.0, "b": 3.0})
    a, b = measure(PROBLEM, [floor("a"), floor("b")], clock, rounds=4, warmup=2)
    assert len(clock.steps) == 2 * (2 + 4)
    assert all({clock.steps[i], clock.steps[i + 1]} == {"a", "b"} for i in range(0, 12, 2)), "a round without everyone"
    assert len({tuple(clock.steps[i : i + 2]) for i in range(0, 12, 2)}) == 2, "the order must change"
    assert (a.rounds, a.median_s, a.over_floor) == (4, 2.0, 1.0)
    assert (b.median_s, b.p10_s, b.p90_s, b.over_floor) == (3.0, 3.0, 3.0, 1.5)


def test_slow_contender_stops_after_its_budget():
    clock = CountingClock({"slow": 10.0, "fast": 1.0})
    slow, fast = measure(PROBLEM, [floor("slow"), floor("fast")], clock, rounds=6, warmup=1, budget_s=25.0)
    assert slow.rounds == 2, "10 s of warm-up, then 10 s and 10 s, which passes 25 s"
    assert fast.rounds == 6 and fast.over_floor == 0.1


def test_who_fails_in_its_turn_takes_no_more_and_the_others_go_on():
    def out_of_memory():
        if len(turns := clock.steps) > 4:
            raise torch.OutOfMemoryError(f"CUDA out of memory after {len(turns)}")
        return "a"

    clock = CountingClock({"a": 2.0, "b": 3.0})
    contenders = [floor("b"), Contender("a", out_of_memory, None)]
    b, a = measure(PROBLEM, contenders, clock, rounds=4, warmup=1)
    assert (a.status, a.median_s, a.why.split(":")[0]) == ("failed", None, "OutOfMemoryError"), a
    assert b.rounds == 4


def test_logits_are_restored_before_every_step():
    problem = row.build(SMALL)
    seen = []
    measure(problem, [Contender("spoils", lambda: seen.append(problem.logits_NV.clone()) or problem.logits_NV.zero_(),
                                None)], CpuClock(cold=False), rounds=2)  # fmt: skip
    assert len(seen) == 1 + 1 + 2, "checked, warmed up, timed twice"
    assert all(torch.equal(logits, problem.pristine_NV) for logits in seen)


# ---- the longest sequence within a budget


@pytest.mark.parametrize("fixed", [0, 3_000_000])
@pytest.mark.parametrize("per_token", [40, 1_000, 90_000])
def test_the_longest_length_that_fits_is_found_in_few_probes(fixed, per_token):
    probes, budget = [], 10_000_000
    found = memory.longest(lambda tokens: probes.append(tokens) or fixed + per_token * tokens, budget)
    best = (budget - fixed) // per_token // memory.GRAIN * memory.GRAIN
    assert (1 - memory.CLOSE) * best - memory.GRAIN <= found.tokens <= best
    assert len(probes) <= memory.PROBES
    assert found.peaks == [(tokens, fixed + per_token * tokens) for tokens in sorted(probes)]


def test_steps_in_the_peak_are_no_trap_and_nothing_may_fit():
    found = memory.longest(lambda tokens: 1_000 * (tokens // 100 * 100), 1_000_000)
    assert 970 <= found.tokens < 1_100
    assert memory.longest(lambda tokens: 10**9, 10**6).tokens == 0
