"""The loop over kinds and cases: measure, print each table as it is done, save."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace

import torch

from benchmarks import longest, provenance, report, traffic
from benchmarks.clocks import Clock, clock_for
from benchmarks.harness import Outcome, measure
from benchmarks.kinds import KINDS
from benchmarks.memory import NotMeasuredError, peak_extra_bytes
from benchmarks.ranks import RanksError, measure_in_ranks

BUDGET_S = 45.0
"""Seconds after which a contender stops taking turns in a case: some take half a minute for one step."""
WARMUP = 1


@dataclass(frozen=True)
class Options:
    """How to measure; the command line's options of these names."""

    quick: bool = False
    device: str = "cpu"
    rounds: int | None = None
    only: str = ""
    skip: Sequence[str] = ()
    case: str = ""
    warm: bool = False
    graph: bool = False
    no_memory: bool = False
    budget: int | None = None  # MiB
    save: str | None = None
    command: str = ""  # as it was typed

    @property
    def turns(self) -> int:
        return self.rounds or (5 if self.quick else 11)


@dataclass(frozen=True)
class Plan:
    """A kind of benchmark, the cases to time, and those (a part of them or others) to weigh as well."""

    kind: str
    timed: list
    weighed: list = field(default_factory=list)


def run(plans: list[Plan], options: Options) -> report.Report:
    """Time all cases, weigh those that are to be weighed; print each table as it is done, save if asked."""
    clock = clock_for(options.device, cold=not options.warm, graph=options.graph)
    commit, load = provenance.commit(), provenance.load_average()
    print(report.header(options.device, clock.name, commit, load))
    print(f"traffic model: {traffic.MODEL}")
    results: list[report.CaseResult] = []
    kinds = ", ".join(plan.kind for plan in plans)
    made = report.Report(kinds, clock.name, options.turns, options.device, commit, options.command, load, results)
    told: set[tuple[str, str]] = set()
    for plan in plans:
        print(f"\n{plan.kind}: {KINDS[plan.kind].title}", flush=True)
        weighed = [] if options.no_memory else plan.weighed
        for case in dict.fromkeys([*plan.timed, *weighed]):
            if options.case in case.label():
                results.append(_case_result(plan.kind, case, clock, options, case in weighed))
                print(report.table(asdict(results[-1]), told) + "\n", flush=True)
                if options.save:  # after each case: a run that is ended early leaves what it has
                    made.save(options.save)
    if options.save:
        print(f"saved {options.save}")
    return made


def _case_result(kind: str, case, clock: Clock, options: Options, weigh: bool) -> report.CaseResult:
    outcomes = _measured(kind, case, clock, options)
    if weigh:
        outcomes = _each(f"memory, {case.label()}", outcomes, lambda outcome: _weighed(kind, case, outcome))
    if kind == "step" and options.budget:
        outcomes = _each(f"longest, {case.label()}", outcomes,
                         lambda outcome: _fitted(case, outcome, options.budget << 20))  # fmt: skip
    return report.CaseResult(kind, asdict(case), case.label(), KINDS[kind].input_bytes(case), outcomes)


def _measured(kind: str, case, clock: Clock, options: Options) -> list[Outcome]:
    if getattr(case, "ranks", 1) > 1:
        with _progress(case.label(), None) as tick:
            tick(f"{case.ranks} ranks at work")
            try:
                return measure_in_ranks(kind, case, rounds=options.turns, only=options.only, skip=options.skip,
                                        cold=not options.warm, budget_s=BUDGET_S)  # fmt: skip
            except RanksError as reason:
                return [Outcome("all", "failed", why=str(reason))]
    if case.device == "cpu":
        torch.set_num_threads(case.threads)
    try:
        problem = KINDS[kind].build(case)
    except ModuleNotFoundError as error:
        return [Outcome("all", "absent", why=f"the inputs need {error.name}; pip install 'gft-kernels[train]'")]
    contenders = KINDS[kind].invite(problem, options.only, options.skip)
    with _progress(case.label(), len(contenders) * (1 + WARMUP + options.turns)) as tick:
        return measure(problem, contenders, clock, rounds=options.turns, warmup=WARMUP, budget_s=BUDGET_S, tick=tick)


def _each(title: str, outcomes: list[Outcome], further: Callable[[Outcome], Outcome]) -> list[Outcome]:
    """Something more about each contender that was timed; a floor's buffers are there before it starts."""
    with _progress(title, len(outcomes)) as tick:
        done = []
        for outcome in outcomes:
            tick(outcome.name)
            worth_it = outcome.status == "timed" and outcome.objective is not None
            done.append(further(outcome) if worth_it else outcome)
        return done


def _weighed(kind: str, case, outcome: Outcome) -> Outcome:
    try:
        return replace(outcome, extra_bytes=peak_extra_bytes(kind, case, outcome.name))
    except NotMeasuredError as reason:
        return replace(outcome, note=f"memory not measured: {reason}")


def _fitted(case, outcome: Outcome, budget_bytes: int) -> Outcome:
    def peak(tokens: int) -> int:
        return peak_extra_bytes("step", replace(case, tokens=tokens), outcome.name)

    try:
        found = longest.longest(peak, budget_bytes)
    except NotMeasuredError as reason:
        return replace(outcome, note=f"memory not measured: {reason}")
    return replace(outcome, longest_tokens=found.tokens, budget_bytes=budget_bytes, peaks=found.peaks)


@contextmanager
def _progress(title: str, total: int | None) -> Iterator[Callable[[str], None]]:
    """A progress bar on stderr where tqdm is installed and a person is watching, silence otherwise."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda word: None
        return
    with tqdm(desc=title, total=total, leave=False, unit=" steps", disable=None) as bar:

        def tick(word: str) -> None:
            bar.set_postfix_str(word, refresh=False)
            bar.update()

        yield tick
