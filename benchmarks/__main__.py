"""The benchmarks: `python -m benchmarks [KIND ...] [options]`, which is also `gft bench`.

Kinds: row, linear, log-probs, advantages, shards, step (default: all). See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import compare, provenance
from benchmarks.grids import SWEEPS
from benchmarks.kinds import KINDS
from benchmarks.runner import Options, Plan, run


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gft bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"{', '.join(KINDS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds: all kinds in 3 minutes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default 1; step: 2)")
    parser.add_argument("--rounds", type=int, default=None, help="timed rounds (default 11, quick 5)")
    parser.add_argument("--only", default="", help="contenders whose name contains this (the floor always runs)")
    parser.add_argument("--skip", action="append", default=[], help="not those whose name contains this; repeatable")
    parser.add_argument("--case", default="", help="cases whose label contains this")
    parser.add_argument("--sweep", choices=SWEEPS, help="the cases that a plot is drawn from, instead of the grid")
    parser.add_argument("--warm", action="store_true", help="do not sweep the caches before each step")
    parser.add_argument("--graph", action="store_true", help="CUDA: time graph replays")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument(
        "--budget", metavar="MIB", type=int, help="step: weigh, and find the longest sequence whose peak fits"
    )
    parser.add_argument("--save", metavar="FILE", help="write the results as JSON")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), type=Path, help="compare two result files, and stop")
    parser.add_argument("--ratios", action="store_true", help="with --compare: times over the floor, on any machines")
    parser.add_argument("--tolerance", type=float, default=compare.TOLERANCE, help="of --ratios (default %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser()
    options = arguments.parse_args(argv)
    if options.compare:
        return compare.compare(*options.compare, ratios=options.ratios, tolerance=options.tolerance)
    for kind in options.kinds:
        if kind not in KINDS:
            arguments.error(f"KIND must be one of {', '.join(KINDS)}, got {kind!r}")
    if options.budget and options.kinds != ["step"]:
        arguments.error("--budget is about whole steps; name the KIND step alone")
    if options.sweep and options.kinds:
        arguments.error(f"--sweep {options.sweep} says itself what it measures; leave out the KIND")
    if options.device == "cuda" and not torch.cuda.is_available():
        arguments.error("--device cuda needs a CUDA GPU, and torch sees none")
    if argv is None:
        provenance.restart_under_headline_allocator("benchmarks")
    options.command = shlex.join(["gft", "bench", *(sys.argv[1:] if argv is None else argv)])
    run(plans(options), Options(**{name: getattr(options, name) for name in Options.__dataclass_fields__}))
    return 0


def plans(options: argparse.Namespace) -> list[Plan]:
    """What to measure: kinds and their cases."""
    if options.sweep:
        kind, cases = SWEEPS[options.sweep]
        timed = cases(options.device, threads=options.threads or 1)
        return [Plan(kind, timed, timed if options.sweep == "memory" else [])]
    found = []
    for name in options.kinds or KINDS:
        kind, threads = KINDS[name], options.threads or (2 if name == "step" else 1)
        grid = {"quick": options.quick, "threads": threads}
        timed, weighed = kind.cases(options.device, **grid), kind.weighed(options.device, **grid)
        found.append(Plan(name, timed, timed if options.budget else weighed))
    return found


if __name__ == "__main__":
    sys.exit(main())
