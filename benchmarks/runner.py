"""The command line that both benchmarks share, and the loop over cases."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from benchmarks import provenance, report, traffic
from benchmarks.clocks import clock_for
from benchmarks.harness import Outcome, measure
from benchmarks.kinds import KINDS
from benchmarks.memory import NotMeasuredError, peak_extra_bytes


def arguments(module: str, description: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; on glibc the process then starts again under the headline allocator setting."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a few small shapes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads of the single-thread cases (CPU)")
    parser.add_argument("--rounds", type=int, default=None, help="timed rounds (default 11, quick 5)")
    parser.add_argument("--only", default="", help="contenders whose name contains this (the floor always runs)")
    parser.add_argument("--case", default="", help="cases whose label contains this")
    parser.add_argument("--warm", action="store_true", help="do not sweep the caches before each step")
    parser.add_argument("--graph", action="store_true", help="CUDA: time graph replays")
    parser.add_argument("--no-memory", action="store_true", help="skip the peak-memory cases")
    parser.add_argument("--save", metavar="FILE", help="write the results as JSON")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA GPU, and torch sees none")
    if argv is None:
        provenance.restart_under_headline_allocator(module)
    return options


BUDGET_S = 45.0
"""Seconds after which a contender stops taking turns in a case: some take half a minute for one step."""


def run(kind: str, timed: Sequence, weighed: Sequence, options: argparse.Namespace) -> report.Report:
    """Time all cases, `weighed` also for peak memory; print each table as it is done, save if asked."""
    clock = clock_for(options.device, cold=not options.warm, graph=options.graph)
    rounds = options.rounds or (5 if options.quick else 11)
    commit = provenance.commit()
    print(report.header(options.device, clock.name, commit))
    print(f"traffic model: {traffic.MODEL}\n")
    weighed = [] if options.no_memory else list(weighed)
    cases = [case for case in dict.fromkeys([*timed, *weighed]) if options.case in case.label()]
    results: list[report.CaseResult] = []
    made = report.Report(kind, clock.name, rounds, options.device, commit, results)
    told: set[tuple[str, str]] = set()
    for case in cases:
        outcomes = _measure_case(kind, case, clock, rounds, options.only)
        if case in weighed:
            outcomes = _weigh(kind, case, outcomes)
        results.append(report.CaseResult(vars(case).copy(), case.label(), KINDS[kind].input_bytes(case), outcomes))
        print(report.table(results[-1], told) + "\n", flush=True)
        if options.save:  # after each case: a run that is ended early leaves what it has
            made.save(options.save)
    if options.save:
        print(f"saved {options.save}")
    return made


def _measure_case(kind: str, case, clock, rounds: int, only: str) -> list[Outcome]:
    if case.device == "cpu":
        torch.set_num_threads(case.threads)
    problem = KINDS[kind].build(case)
    contenders = KINDS[kind].contenders(problem, only)
    with _progress(case.label()) as tick:
        return measure(problem, contenders, clock, rounds=rounds, budget_s=BUDGET_S, tick=tick)


def _weigh(kind: str, case, outcomes: list[Outcome]) -> list[Outcome]:
    with _progress(f"memory, {case.label()}") as tick:
        weighed = []
        for outcome in outcomes:
            tick(outcome.name)
            # a floor's buffers are there before it starts: its extra memory says nothing
            worth_it = outcome.status == "timed" and outcome.objective is not None
            weighed.append(_weighed(kind, case, outcome) if worth_it else outcome)
        return weighed


def _weighed(kind: str, case, outcome: Outcome) -> Outcome:
    try:
        return replace(outcome, extra_bytes=peak_extra_bytes(kind, case, outcome.name))
    except NotMeasuredError as reason:
        return replace(outcome, note=f"memory not measured: {reason}")


@contextmanager
def _progress(title: str) -> Iterator[Callable[[str], None]]:
    """A progress bar on stderr where tqdm is installed and a person is watching, silence otherwise."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda word: None
        return
    with tqdm(desc=title, leave=False, unit=" steps", disable=None) as bar:

        def tick(word: str) -> None:
            bar.set_postfix_str(word, refresh=False)
            bar.update()

        yield tick
