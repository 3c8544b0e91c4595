"""`python -m benchmarks.gpu --results FOLDER [--stages a,b] [--wheels FOLDER] [--commit TEXT] [--limit SECONDS]`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.gpu import stages
from benchmarks.gpu.stages import STAGES, Run, StageResult


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    options.results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(options.results.resolve(), Path(scratch), options.limit)
        outcomes = [stages.wheels(run, options.wheels)] if options.wheels else []
        for name in options.stages:
            if run.remaining() < 5:
                outcomes.append(StageResult(name, "skipped", 0.0, "no time was left"))
            else:
                outcomes.append(STAGES[name](run))
            print(f"{name}: {outcomes[-1].outcome} in {outcomes[-1].seconds:.0f} s. {outcomes[-1].why}", flush=True)
            write_summary(run, options, outcomes)  # each time: what is known so far survives whatever comes next
    return 0 if all(outcome.outcome in ("passed", "skipped") for outcome in outcomes) else 1


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Build, test and measure on a GPU.")
    parser.add_argument("--results", type=Path, required=True, help="folder for the JSON files")
    parser.add_argument("--stages", default=None, help=f"some of {','.join(STAGES)}, in this order")
    parser.add_argument("--wheels", type=Path, default=os.environ.get("GFT_WHEELS"), help="folder of wheels to use")
    parser.add_argument("--commit", default="", help="what is measured, where this is no git checkout")
    parser.add_argument("--limit", type=float, default=570.0, help="seconds for everything")
    options = parser.parse_args(argv)
    options.stages = options.stages.split(",") if options.stages else list(STAGES)
    unknown = [name for name in options.stages if name not in STAGES]
    if unknown:
        parser.error(f"--stages must be some of {', '.join(STAGES)}, got {', '.join(unknown)}")
    return options


def write_summary(run: Run, options: argparse.Namespace, outcomes: list[StageResult]) -> None:
    summary = {
        "taken": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit_given": options.commit,
        **stages.provenance(run),
        "stages": [asdict(outcome) for outcome in outcomes],
    }
    (run.results / "run.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
