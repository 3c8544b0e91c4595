"""`gft bench` and `gft study` hand over to modules of the source tree, which the installed package does not carry."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def hand_over(module: str, arguments: list[str]) -> int:
    """Run `python -m module` of the source tree with these arguments, in the caller's folder; its exit code.

    Raises: FileNotFoundError where no source tree is at hand.
    """
    root = source_tree()
    if root is None:
        raise FileNotFoundError(
            "the benchmarks are in the folder benchmarks/ of the gft_kernels source tree, which an installed package "
            "does not carry; run the command there, or from an editable install of it (pip install -e .)."
        )
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.call(command, env={**os.environ, "PYTHONPATH": path})


def source_tree() -> Path | None:
    """The tree this package is run from, or else the one the caller stands in."""
    candidates = (Path(__file__).parents[2], Path.cwd())
    return next((root for root in candidates if (root / "benchmarks" / "harness.py").is_file()), None)
