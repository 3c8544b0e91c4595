"""`python -m benchmarks.gpu PROFILE --results FOLDER`: see the package's docstring."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu import programs, summary
from benchmarks.gpu.stages import PROFILES, Profile, Run, Stage

ENOUGH_S = 3.0
"""A stage that would have less is not begun."""
ENDINGS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    before = {number: signal.signal(number, stop) for number in ENDINGS}
    lines: list[dict] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        run = Run(options.results.resolve(), Path(scratch), options.stub, options.commit)
        if not os.access(run.environment.get("HOME", ""), os.W_OK):  # Triton and torch.compile keep their work there
            run.environment |= {"HOME": scratch, "USER": "nobody"}
        try:
            every(PROFILES[options.profile], run, options, lines)
        except programs.StoppedError as told:
            programs.say(f"ended by {told}")
        programs.say(summary.text(run.results, lines))
    for number, handler in before.items():
        signal.signal(number, handler)
    return 0 if lines and all(line["outcome"] in ("passed", "skipped") for line in lines) else 1


def stop(number: int, frame: object) -> None:
    """Once: what stage there is ends, its line is written, and the summary stands."""
    for ending in ENDINGS:
        signal.signal(ending, signal.SIG_IGN)
    raise programs.StoppedError(signal.Signals(number).name)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Test or measure on a GPU.")
    parser.add_argument("profile", choices=PROFILES)
    parser.add_argument("--results", type=Path, required=True, help="folder for the results")
    parser.add_argument("--stages", default=None, help="some of the profile's, separated by commas")
    parser.add_argument("--wheels", type=Path, default=os.environ.get("GFT_WHEELS"), help="folder of wheels to use")
    parser.add_argument("--commit", default="", help="what is measured, where this is no git checkout")
    parser.add_argument("--limit", type=float, default=None, help="seconds for everything (default: the profile's)")
    parser.add_argument("--stub", action="store_true", help="rehearse: a stand-in answers as a GPU would")
    options = parser.parse_args(argv)
    names = [stage.name for stage in PROFILES[options.profile].stages]
    options.stages = options.stages.split(",") if options.stages else names
    unknown = [name for name in options.stages if name not in names]
    if unknown:
        parser.error(f"--stages must be some of {', '.join(names)}, got {', '.join(unknown)}")
    try:
        options.results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--results must be a folder, got {options.results}: {error.strerror}")
    return options


def every(profile: Profile, run: Run, options: argparse.Namespace, lines: list[dict]) -> None:
    """The stages in turn. One may take what is left beside the reserves of those after it."""
    deadline = time.monotonic() + (options.limit or profile.limit_s)
    stages = [stage for stage in profile.stages if stage.name in options.stages]
    file = run.results / f"{options.profile}.jsonl"
    if options.wheels:
        stages.insert(0, wheels(run, Path(options.wheels)))
    for number, stage in enumerate(stages):
        reserved = sum(later.reserve_s for later in stages[number + 1 :])
        line = one(stage, run, deadline - time.monotonic() - reserved)
        lines.append(line)
        programs.append(file, line)
        programs.say(f"{stage.name}: {line['outcome']} in {line['seconds']:.0f} s. {line['why']}")
        if line["outcome"] == "stopped":
            break


def one(stage: Stage, run: Run, limit_s: float) -> dict:
    """Run a stage, and keep of it what it says and what its `read` finds."""
    if limit_s < ENOUGH_S:
        return programs.Ended("out of time", 0.0, "no time was left").line(stage.name)
    command = stage.command(run)
    if isinstance(command, str):
        return programs.Ended("skipped", 0.0, command).line(stage.name)
    try:
        ended = programs.run(run.rehearsed(stage.name, command), limit_s, run.scratch / f"{stage.name}.log",
                             {**run.environment, **stage.environment})  # fmt: skip
    except OSError as error:  # no room for its output, no process to be had
        return programs.Ended("failed", 0.0, repr(error)).line(stage.name)
    try:
        found = stage.read(run, ended.output)
    except Exception as error:  # what a broken tool prints must not end the run
        found = {"read_failed": repr(error)}
    return ended.line(stage.name) | found


UNPACK = """
import pathlib, sys, zipfile
site, *found = map(pathlib.Path, sys.argv[1:])
for wheel in found:
    zipfile.ZipFile(wheel).extractall(site)
(site / "sitecustomize.py").write_text("import os, site; site.addsitedir(os.path.dirname(__file__))")
"""
"""Not by pip: in a plain folder it merges no package of two wheels, and nothing reads a .pth file there."""


def wheels(run: Run, folder: Path) -> Stage:
    """Unpack wheels where only this run looks."""
    site = run.scratch / "site"
    run.environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), run.environment.get("PYTHONPATH")]))
    found = map(str, sorted(folder.glob("*.whl")))
    return Stage("wheels", 20, lambda _: [sys.executable, "-c", UNPACK, str(site), *found])


if __name__ == "__main__":
    sys.exit(main())
