"""A pytest plugin: a JSON line for each test that ended, as it ended; `-p benchmarks.gpu.lines --test-lines FILE`."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu.programs import append


def pytest_addoption(parser):
    parser.addoption("--test-lines", type=Path, required=True, help="file that gets a line a test")


def pytest_configure(config):
    config.pluginmanager.register(Lines(config.getoption("--test-lines")))


class Lines:
    def __init__(self, file: Path):
        self.file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            why = "" if report.passed else report.longreprtext[-1500:]
            seconds = round(report.duration, 2)
            append(self.file, {"test": report.nodeid, "outcome": report.outcome, "seconds": seconds, "why": why})
