"""`python -m benchmarks.experiments`: run a study, write the page of its results."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.experiments import report, results, runner, settings
from benchmarks.experiments.jobs import Folder
from gft_kernels.cli.exits import BAD_INPUT, DONE, FAILED, INTERRUPTED

PROGRAM = "python -m benchmarks.experiments"


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except (ValueError, OSError, runner.StudyError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return FAILED if isinstance(error, runner.StudyError) else BAD_INPUT
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser():
    said = "Compare training methods with seeds, error bars and controls."
    parser = argparse.ArgumentParser(prog=PROGRAM, description=said)
    actions = parser.add_subparsers(required=True)

    run = actions.add_parser("run", help="train what is missing of a study; the same command goes on after a stop")
    which = run.add_mutually_exclusive_group(required=True)
    which.add_argument("study", nargs="?", help="a name in benchmarks/experiments/studies, or a YAML file")
    which.add_argument("--quick", action="store_true", help="the study `quick`: a few minutes on two cores")
    run.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, a process and a core each")
    run.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (default: %(default)s)")
    run.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="change the study: stage.max_steps=40")
    run.add_argument("--later", nargs="+", default=[], metavar="METHOD", help="leave these methods for another time")
    run.add_argument("--out", type=Path, metavar="FOLDER", help="results and models (default: runs/studies/NAME)")
    run.set_defaults(command=run_study)

    page = actions.add_parser("report", help="write the page of tables and plots from result files")
    page.add_argument("results", nargs="*", type=Path, help=".jsonl files (default: benchmarks/results/experiments)")
    page.add_argument("--out", type=Path, default=Path("docs/experiments.md"), help="page (default: %(default)s)")
    page.set_defaults(command=write_report)
    return parser


def run_study(options) -> int:
    """Trains what is missing, packs the results and writes the study's own report beside them."""
    study = settings.load("quick" if options.quick else options.study, options.set)
    if options.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {options.jobs}.")
    folder = Folder(options.out or Path("runs", "studies", study.name))
    runner.keep_settings(study, folder)
    try:
        runner.run(study, folder, options.jobs, options.device, lambda line: print(line, flush=True), options.later)
    finally:
        packed = results.pack(study, folder, options.device)
        print(f"results  {packed}", flush=True)
    print(f"report   {report.write([results.read(packed)], folder.path / 'report.md')}")
    return DONE


def write_report(options) -> int:
    """One page from one or more result files."""
    files = options.results or sorted(results.PACKED.glob("*.jsonl"))
    print(report.write([results.read(path) for path in files], options.out))
    return DONE


if __name__ == "__main__":
    sys.exit(main())
