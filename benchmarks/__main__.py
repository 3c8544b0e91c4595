"""The benchmarks: `python -m benchmarks [KIND ...] [options]`; see benchmarks/README.md.

Kinds: row, linear, log-probs, advantages, shards, step, prompts (default: all).
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks import compare, memory, provenance, report
from benchmarks.clocks import Clock, clock_for
from benchmarks.harness import Outcome, measure, sentence
from benchmarks.kinds import KINDS, SWEEPS, WEIGHED

BUDGET_S = 45.0
"""Seconds after which a contender stops taking turns in a case: some take half a minute for one step."""
WARMUP = 1
THREADS = {"step": 2, "prompts": 2}  # of a CPU; other kinds take one
ROUNDS = {True: 5, False: 11}  # quick, or not


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    several = {"action": "append", "default": [], "metavar": "TEXT"}
    flag, file = {"action": "store_true"}, {"metavar": "FILE", "type": Path}
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"{', '.join(KINDS)}; default: all")
    parser.add_argument("--quick", **flag, help="small shapes, few rounds: all kinds in 3 minutes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default 1; step, prompts: 2)")
    parser.add_argument("--rounds", type=int, help="timed rounds (default 11, quick 5)")
    parser.add_argument("--only", **several, help="contenders whose name contains this (the floor always runs)")
    parser.add_argument("--skip", **several, help="not those whose name contains this; both repeatable")
    parser.add_argument("--case", **several, help="cases whose label contains this; repeatable")
    parser.add_argument("--sweep", choices=SWEEPS, help="other cases: a plot's, or a GPU's")
    parser.add_argument("--allocator", choices=provenance.ALLOCATORS, default="keep",
                        help="of a CPU with glibc: told to keep freed blocks (default), or as it is")  # fmt: skip
    parser.add_argument("--warm", **flag, help="do not sweep the caches before each step")
    parser.add_argument("--graph", **flag, help="CUDA: time graph replays")
    parser.add_argument("--no-memory", **flag, help="do not measure peak memory")
    parser.add_argument("--budget", metavar="MIB", type=int, help="step: find the longest sequence whose peak fits")
    parser.add_argument("--save", **file, help="write the results as JSON")
    parser.add_argument("--again", **file, nargs="+", help="make result files anew, each by its own command")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), type=Path, help="compare two result files, and stop")
    parser.add_argument("--ratios", **flag, help="with --compare: do A's speed-ups hold in B, on any machine")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser()
    options = arguments.parse_args(argv)
    for path in [*(options.compare or []), *(options.again or [])]:
        if not path.is_file():
            arguments.error(f"result files must be there, got {path}; there is no such file")
    if options.compare:
        return compare.compare(*options.compare, ratios=options.ratios)
    if options.again:
        # the command keeps the file where it was saved, so it is made anew in its place
        commands = [shlex.split(report.load(path)["command"]) for path in options.again]
        return max(subprocess.call([sys.executable, *command[1:]]) for command in commands)
    if argv is None:
        provenance.restart_under(options.allocator, "benchmarks")
    for kind in options.kinds:
        if kind not in KINDS:
            arguments.error(f"KIND must be one of {', '.join(KINDS)}, got {kind!r}")
    if options.budget and options.kinds != ["step"]:
        arguments.error("--budget is about whole steps; name the KIND step alone")
    if options.sweep and options.kinds:
        arguments.error(f"--sweep {options.sweep} says itself what it measures; leave out the KIND")
    if options.device == "cuda" and not torch.cuda.is_available():
        arguments.error("--device cuda needs a CUDA GPU, and torch sees none")
    run(options, shlex.join(["python", "-m", "benchmarks", *(sys.argv[1:] if argv is None else argv)]))
    return 0


def run(options: argparse.Namespace, command: str) -> None:
    """Time all cases, weigh those that are to be weighed; print each table as it is done, save if asked."""
    clock = clock_for(options.device, cold=not options.warm, graph=options.graph)
    made = report.Report(command, clock.name, options.rounds or ROUNDS[options.quick], options.device)
    print(made.header())
    print(f"traffic model: {report.TRAFFIC_MODEL}")
    told: set[tuple[str, str]] = set()
    for kind, timed, weighed in plans(options):
        print(f"\n{kind}: {KINDS[kind].title}", flush=True)
        for case in dict.fromkeys([*timed, *weighed]):
            if not options.case or any(text in case.label() for text in options.case):
                result = _result(kind, case, clock, made.rounds, options, case in weighed)
                made.results.append(result)
                print(report.table(asdict(result), told) + "\n", flush=True)
                if options.save:  # after each case: a run that is ended early leaves what it has
                    made.save(options.save)
    if options.save:
        print(f"saved {options.save}")


def plans(options: argparse.Namespace) -> Iterator[tuple[str, list, list]]:
    """Kinds, the cases that are timed, and those (a part of them or others) that are weighed as well."""
    if options.sweep:
        kind, cases = SWEEPS[options.sweep]
        timed = cases(options.device, threads=options.threads or THREADS.get(kind, 1))
        yield kind, timed, [] if options.no_memory or options.sweep not in WEIGHED else timed
        return
    for name in options.kinds or KINDS:
        threads = options.threads or THREADS.get(name, 1)
        timed = KINDS[name].cases(options.device, quick=options.quick, threads=threads)
        weighed = timed if options.budget else KINDS[name].weighed(timed, options.quick)
        yield name, timed, [] if options.no_memory else weighed


def _result(kind: str, case, clock: Clock, rounds: int, options: argparse.Namespace, weigh: bool) -> report.CaseResult:
    outcomes = _measured(kind, case, clock, rounds, options)
    if weigh:
        outcomes = _each(f"memory, {case.label()}", outcomes, lambda o: _weighed(kind, case, o))
    if kind == "step" and options.budget:
        outcomes = _each(f"longest, {case.label()}", outcomes, lambda o: _fitted(case, o, options.budget << 20))
    return report.CaseResult(kind, asdict(case), case.label(), KINDS[kind].input_bytes(case), outcomes)


def _measured(kind: str, case, clock: Clock, rounds: int, options: argparse.Namespace) -> list[Outcome]:
    chosen = {"only": options.only, "skip": options.skip}
    if KINDS[kind].measure:
        return KINDS[kind].measure(case, rounds=rounds, cold=not options.warm, budget_s=BUDGET_S, **chosen)
    if case.device == "cpu":
        torch.set_num_threads(case.threads)
    try:
        problem = KINDS[kind].build(case)
    except ModuleNotFoundError as error:
        return [Outcome("all", "absent", why=f"the inputs need {error.name}; pip install 'gft-kernels[train]'")]
    except (RuntimeError, ValueError) as error:  # a GPU out of memory, a model not here: this case alone is lost
        return [Outcome("all", "failed", why=sentence(error))]
    contenders = KINDS[kind].invite(problem, **chosen)
    with _progress(case.label(), len(contenders) * (1 + WARMUP + rounds)) as tick:
        return measure(problem, contenders, clock, rounds=rounds, warmup=WARMUP, budget_s=BUDGET_S, tick=tick)


def _each(title: str, outcomes: list[Outcome], weigh: Callable[[Outcome], Outcome]) -> list[Outcome]:
    """The memory of each contender that was timed; a floor's buffers are there before it starts."""
    with _progress(title, len(outcomes)) as tick:
        done = []
        for outcome in outcomes:
            tick(outcome.name)
            if outcome.status == "timed" and outcome.objective is not None:
                try:
                    outcome = weigh(outcome)
                except memory.NotMeasuredError as reason:
                    outcome = replace(outcome, note=f"memory not measured: {reason}")
            done.append(outcome)
        return done


def _weighed(kind: str, case, outcome: Outcome) -> Outcome:
    return replace(outcome, extra_bytes=memory.peak_extra_bytes(kind, case, outcome.name))


def _fitted(case, outcome: Outcome, budget_bytes: int) -> Outcome:
    def peak(tokens: int) -> int:
        return memory.peak_extra_bytes("step", replace(case, tokens=tokens), outcome.name)

    found = memory.longest(peak, budget_bytes)
    return replace(outcome, longest_tokens=found.tokens, budget_bytes=budget_bytes, peaks=found.peaks)


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[str], None]]:
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


if __name__ == "__main__":
    sys.exit(main())
