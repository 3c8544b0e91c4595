"""`python -m benchmarks.gpu PROFILE --results FOLDER`: see the package's docstring."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu import programs, summary
from benchmarks.gpu.stages import PROFILES, Profile, Run, Stage

ENOUGH_S = 3.0
"""A stage that would have less is not begun."""
ENDINGS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    told: list[str] = []  # the signals that came: what runs is ended, its line is written, and the summary stands
    before = {number: signal.signal(number, lambda n, _: told.append(signal.Signals(n).name)) for number in ENDINGS}
    lines: list[dict] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        run = Run(options.results.resolve(), Path(scratch), options.stub)
        if not os.access(run.environment.get("HOME", ""), os.W_OK):  # Triton and torch.compile keep their work there
            run.environment |= {"HOME": scratch, "USER": "nobody"}
        if options.commit:
            run.environment["GFT_COMMIT"] = options.commit
        every(PROFILES[options.profile], run, options, lines, told)
        programs.say(summary.text(run.results, lines))
    for number, handler in before.items():
        signal.signal(number, handler)
    return 0 if lines and not told and all(line["outcome"] in ("passed", "skipped") for line in lines) else 1


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Test or measure on a GPU.")
    parser.add_argument("profile", choices=PROFILES)
    parser.add_argument("--results", type=Path, required=True, help="folder for the results")
    parser.add_argument("--stages", default=None, help="some of the profile's, separated by commas")
    parser.add_argument("--wheels", type=Path, default=os.environ.get("GFT_WHEELS"), help="folder of wheels to use")
    parser.add_argument("--commit", default=os.environ.get("GFT_COMMIT"), help="measured, where git cannot say it")
    parser.add_argument("--limit", type=float, default=None, help="seconds for everything (default: the profile's)")
    parser.add_argument("--stub", action="store_true", help="rehearse: a stand-in answers as a GPU would")
    options = parser.parse_args(argv)
    names = [stage.name for step in PROFILES[options.profile].steps for stage in step]
    options.stages = options.stages.split(",") if options.stages else names
    unknown = [name for name in options.stages if name not in names]
    if unknown:
        parser.error(f"--stages must be some of {', '.join(names)}, got {', '.join(unknown)}")
    try:
        options.results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--results must be a folder, got {options.results}: {error.strerror}")
    return options


def every(profile: Profile, run: Run, options: argparse.Namespace, lines: list[dict], told: list[str]) -> None:
    """The steps in turn. One may take what is left beside the reserves of those after it."""
    deadline = time.monotonic() + (options.limit or profile.limit_s)
    steps = [[stage for stage in step if stage.name in options.stages] for step in profile.steps]
    if options.wheels:
        steps.insert(0, [wheels(run, Path(options.wheels))])
    for number, step in enumerate(steps):
        reserved = sum(max((stage.reserve_s for stage in later), default=0.0) for later in steps[number + 1 :])
        for line in together(step, run, deadline - time.monotonic() - reserved, told):
            lines.append(line)
            programs.append(run.results / f"{options.profile}.jsonl", line)
            programs.say(f"{line['stage']}: {line['outcome']} in {line['seconds']:.0f} s. {line['why']}")
        if told:
            programs.say(f"ended by {told[0]}")
            return


def together(step: list[Stage], run: Run, limit_s: float, told: list[str]) -> Iterator[dict]:
    """Run the stages of a step at once, each under the same limit; the line of each as it ends."""
    running = []
    for stage in step:
        begun = begin(stage, run, limit_s)
        if isinstance(begun, programs.Ended):
            yield begun.line(stage.name)
        else:
            running.append((stage, begun))
    while running:
        for stage, program in list(running):
            if ended := program.ended(told):
                running.remove((stage, program))
                yield line_of(stage, run, ended)
        time.sleep(programs.POLL_S)


def begin(stage: Stage, run: Run, limit_s: float) -> programs.Program | programs.Ended:
    if limit_s < ENOUGH_S:
        return programs.Ended("out of time", 0.0, "no time was left")
    command = stage.command(run)
    if isinstance(command, str):
        return programs.Ended("skipped", 0.0, command)
    try:
        return programs.Program(run.rehearsed(stage.name, command), limit_s, run.scratch / f"{stage.name}.log",
                                {**run.environment, **stage.environment})  # fmt: skip
    except OSError as error:  # no room for its output, no process to be had
        return programs.Ended("failed", 0.0, f"{command[0]} does not start: {error!r}")


def line_of(stage: Stage, run: Run, ended: programs.Ended) -> dict:
    """What a stage says, and what its `read` finds."""
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
