"""`gft study`: the door to benchmarks/experiments, which a source checkout has and the installed package has not."""

from __future__ import annotations

import importlib
import os
import sys

from gft_kernels.cli import BAD_INPUT


def study(options) -> int:
    """Runs the command in the checkout that is the current directory; elsewhere says so and returns 2."""
    sys.path.insert(0, os.getcwd())
    try:
        command = importlib.import_module("benchmarks.experiments.command")
    except ModuleNotFoundError as error:
        if error.name is None or not "benchmarks.experiments.command".startswith(error.name):
            raise
        print(
            f"gft study: must be run at the top of a source checkout, got {os.getcwd()!r}; the studies lie in "
            "benchmarks/experiments, which is not installed: clone the repository and run the command there.",
            file=sys.stderr,
        )
        return BAD_INPUT
    return getattr(command, options.action)(options)
