"""Tests whose results stand whatever becomes of them: `python -m benchmarks.gpu.lines FILE PATH... [OPTION...]`.

Runs pytest with this file as its plugin (OPTION: pytest's), a process for each PATH, all at once: FILE gets a JSON line
for each test as it begins and one as it ended. Where a kernel hangs or leaves a GPU that answers nothing any more, that
process is given up and the tests that are left of its PATH run in a new one.
"""

from __future__ import annotations

import faulthandler
import itertools
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu.programs import POLL_S, ROOT, append, lines_of

PROCESSES = 4  # at most, of a path
TEST_S = 30.0  # of a test at most: a first call compiles
STICKY = re.compile("illegal memory access|misaligned address|device-side assert triggered|unspecified launch failure|"
                    "illegal instruction|CUDA_ERROR_LAUNCH")  # fmt: skip
"""CUDA's errors that every later call of the process reports too."""


def main(file: Path, options: list[str]) -> int:
    """The first exit status of pytest that is not 0."""
    file.unlink(missing_ok=True)
    paths = list(itertools.takewhile(lambda word: not word.startswith("-"), options))
    # in one word with its option, for pytest takes a path that is there for one of the tests' and names them from it
    command = [sys.executable, "-m", "pytest", *options[len(paths) :], "-q", "-p", "benchmarks.gpu.lines",
               f"--test-lines={file}", "-p", "no:cacheprovider"]  # fmt: skip
    begun = [(path, subprocess.Popen([*command, path], cwd=ROOT)) for path in paths]
    status, left = 0, dict.fromkeys(paths, PROCESSES - 1)
    while begun:
        path, process = begun.pop(0)
        if process.poll() is None:
            time.sleep(POLL_S)
            begun.append((path, process))
            continue
        status = status or process.returncode
        if left[path] and _broken(file, process):
            left[path] -= 1
            begun.append((path, subprocess.Popen([*command, path], cwd=ROOT)))
    return status


def _broken(file: Path, process: subprocess.Popen) -> bool:
    """Whether its last test ended the process, or the GPU for it."""
    last = [line for line in lines_of(file) if line["process"] == process.pid][-1:]
    return any(line["outcome"] == "begun" or STICKY.search(line["why"]) for line in last)


def pytest_addoption(parser):
    parser.addoption("--test-lines", type=Path, required=True, help="file that gets two lines a test")
    parser.addoption("--test-limit", type=float, default=TEST_S, help="seconds a test may take")


def pytest_configure(config):
    config.pluginmanager.register(Lines(config.getoption("--test-lines"), config.getoption("--test-limit")))


class Lines:
    def __init__(self, file: Path, limit_s: float):
        self.file, self.limit_s = file, limit_s
        self.screen = os.dup(sys.stderr.fileno())  # before pytest captures it

    def say(self, test: str, outcome: str, **more) -> None:
        append(self.file, {"process": os.getpid(), "test": test, "outcome": outcome, **more})

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.session = session

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Without those that an earlier process has begun."""
        begun = {line["test"] for line in lines_of(self.file)}
        items[:] = [item for item in items if item.nodeid not in begun]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.say(nodeid, "begun", why=f"it ended the process, or took {self.limit_s:g} s")
        faulthandler.dump_traceback_later(self.limit_s, exit=True, file=self.screen)

    def pytest_runtest_logfinish(self) -> None:
        faulthandler.cancel_dump_traceback_later()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            why = "" if report.passed else report.longreprtext[-1500:]
            self.say(report.nodeid, report.outcome, seconds=round(report.duration, 2), why=why)
            if STICKY.search(why):
                self.session.shouldstop = "the GPU answers nothing more"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
