"""The harness: contenders are checked against fp64, then timed in turns in one process; the spread is reported.

Rules it keeps, whatever is measured:
- Nothing that answers wrongly is timed, and the error of everything that is timed stands beside its time.
- A step is always forward and backward: a fused forward that already holds the gradient wins nothing by it.
- Contenders take turns round by round in shuffled order, so that a slow moment of the machine hits all of them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy
from torch import Tensor

from benchmarks.clocks import Clock, Step

CHECK_UPSTREAM = 1.7
"""The upstream gradient of the checked steps: not 1, so that whoever drops it is caught."""


@dataclass(frozen=True)
class Passes:
    """The traffic model: reads and writes of all N·V logits once, N·V·b bytes each.

    They are counted apart, because a write-allocate cache and a streaming store differ by a read.
    """

    reads: float
    writes: float


@dataclass(frozen=True)
class Answer:
    """What a step hands back to be checked: its loss (), or its values where nothing is differentiated; gradients."""

    loss: Tensor
    gradients: tuple[Tensor, ...]


@dataclass(frozen=True)
class Deviation:
    """How far an answer is from fp64.

    scaled: the largest gap of loss or row gradient, against the size a row's gradient has before (π − 1) shrinks it.
    This one is held to a limit. worst_row: the largest gap against the row's own gradient; reported, for near π = 1
    plain PyTorch itself loses the digits (in bf16 all of them).
    """

    scaled: float
    worst_row: float


class Problem(Protocol):
    """Inputs of one case, which has the upstream gradient of the timed steps."""

    case: Any
    limit: float  # the largest scaled deviation that counts as an answer

    def prepare(self, upstream: float) -> None: ...  # restores what a step may overwrite, sets upstream; never timed

    def deviation(self, answer: Answer, objective: str) -> Deviation: ...


@dataclass(frozen=True)
class Contender:
    """Something that can be timed. `objective` None: a floor, which has no answer to check."""

    name: str
    step: Step
    objective: str | None = "gft"
    passes: Passes | None = None  # of the traffic model, where it is known
    limit: float | None = None  # of its deviation, if it is not the problem's


@dataclass(frozen=True)
class Outcome:
    """One contender's result in one case. status: timed, absent, failed or wrong answer."""

    name: str
    status: str
    objective: str | None = None
    why: str = ""
    error: float | None = None  # Deviation.scaled
    worst_row_error: float | None = None  # Deviation.worst_row
    rounds: int = 0  # that it was timed in
    median_s: float | None = None
    p10_s: float | None = None
    p90_s: float | None = None
    over_floor: float | None = None  # median over the rounds of (this contender / the floor in the same round)
    extra_bytes: int | None = None  # peak beyond the inputs in one step
    reads: float | None = None  # passes of the traffic model, where known
    writes: float | None = None
    longest_tokens: int | None = None  # of a response, within budget_bytes beyond the inputs (memory.py)
    budget_bytes: int | None = None
    peaks: list[tuple[int, int]] = field(default_factory=list)  # (tokens, bytes) that were measured on the way
    note: str = ""


class AbsentError(RuntimeError):
    """Raised by a step that is not possible here, or by the making of it; the message says why."""


def quantile(samples: Sequence[float], q: float) -> float:
    """Linear between neighbours."""
    return float(numpy.quantile(samples, q))


def check(problem: Problem, contender: Contender) -> Outcome:
    """Run one step and compare it with fp64. The outcome is "ready" where the contender may be timed."""
    outcome = Outcome(contender.name, "ready", contender.objective)
    if contender.passes:
        outcome = replace(outcome, reads=contender.passes.reads, writes=contender.passes.writes)
    try:
        problem.prepare(CHECK_UPSTREAM)
        answer = contender.step()
        if contender.objective is None:
            return outcome
        if answer is None:
            return replace(outcome, status="wrong answer", why="the step handed back no loss and gradient to check")
        found = problem.deviation(answer, contender.objective)
    except AbsentError as reason:
        return replace(outcome, status="absent", why=str(reason))
    except Exception as error:  # a peer may fail in any way; the table says so and the run goes on
        return replace(outcome, status="failed", why=sentence(error))
    outcome = replace(outcome, error=found.scaled, worst_row_error=found.worst_row)
    limit = problem.limit if contender.limit is None else contender.limit
    if not found.scaled <= limit:
        why = f"off by {found.scaled:.1e} of the gradient's scale against fp64, allowed {limit:.0e}; not timed"
        return replace(outcome, status="wrong answer", why=why)
    return outcome


def sentence(error: Exception) -> str:
    """The first line of an error, with its type."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def measure(
    problem: Problem,
    contenders: Sequence[Contender],
    clock: Clock,
    *,
    rounds: int,
    warmup: int = 1,
    budget_s: float = math.inf,
    tick: Callable[[str], None] = lambda word: None,
) -> list[Outcome]:
    """Check every contender, then time those that passed, taking turns. The first floor is what ratios are against.

    budget_s: a contender that has been timed for longer takes no more turns; it has one sample at least.
    """
    outcomes, steps = _admit(problem, contenders, clock, tick)
    samples = _take_turns(problem, steps, clock, rounds, warmup, budget_s, tick)
    for name in [name for name, taken in samples.items() if isinstance(taken, str)]:
        outcomes[name] = replace(outcomes[name], status="failed", why=samples.pop(name))
    floor = next((samples[name] for name in samples if outcomes[name].objective is None), None)
    timed = {name: _summary(outcomes[name], taken, floor) for name, taken in samples.items()}
    return list((outcomes | timed).values())


def _admit(problem, contenders, clock, tick) -> tuple[dict[str, Outcome], dict[str, Callable[[], object]]]:
    """Everyone's outcome so far by name, and the steps of those that may be timed."""
    outcomes, steps = {}, {}
    for contender in contenders:
        tick(f"check {contender.name}")
        outcome = check(problem, contender)
        if outcome.status == "ready":
            try:
                steps[contender.name] = clock.arm(contender.step)
            except Exception as error:  # as in check
                outcome = replace(outcome, status="failed", why=sentence(error))
        outcomes[contender.name] = outcome
    return outcomes, steps


def _take_turns(problem, steps, clock, rounds, warmup, budget_s, tick) -> dict[str, list[float] | str]:
    """Each one's seconds; instead of them a sentence for one that failed, which takes no more turns."""
    samples: dict[str, list[float] | str] = {name: [] for name in steps}
    spent, order = dict.fromkeys(steps, 0.0), random.Random(0)
    for turn in range(warmup + rounds):
        names = [name for name in spent if turn <= warmup or spent[name] <= budget_s]
        order.shuffle(names)
        for name in names:
            tick(name)
            try:
                problem.prepare(problem.case.upstream)
                seconds = clock.time(steps[name])
            except RuntimeError as error:  # out of memory in one's turn is not the others' end
                samples[name] = sentence(error)
                del spent[name]
                continue
            spent[name] += seconds
            if turn >= warmup:
                samples[name].append(seconds)
    return samples


def _summary(outcome: Outcome, samples: list[float], floor: list[float] | None) -> Outcome:
    p10, median, p90 = (quantile(samples, q) for q in (0.1, 0.5, 0.9))
    # one that ran out of its budget was in the first rounds, so that zip still pairs rounds
    over = quantile([mine / its for mine, its in zip(samples, floor, strict=False)], 0.5) if floor else None
    outcome = replace(outcome, status="timed", rounds=len(samples), over_floor=over)
    return replace(outcome, median_s=median, p10_s=p10, p90_s=p90)
