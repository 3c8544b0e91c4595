"""Runs test files again in a process where Triton interprets its kernels.

Triton decides between compiler and interpreter when a kernel is defined, hence a process of its own. Its callers are
three files, test_triton_interpreter*.py, so that as many workers share them.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LEFT_OUT = (  # names in `-k`
    "bfloat16", "32000", "50257", "65537", "129920", "151936", "262144", "twenty_runs", "module", "compiles", "opcheck",
    "lengths", "autocast",
)  # fmt: skip
"""bfloat16 (the interpreter truncates where a GPU rounds), rows too long for Python, repetition, and what does not
depend on the backend."""

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (pip install triton)"
)


def assert_passes(*where: str, names: str = "") -> None:
    """`where` are files under tests/, or one test of them; `names` is pytest's -k."""
    paths = [str(ROOT / "tests" / path) for path in where]
    command = [sys.executable, "-m", "pytest", "-x", "--device", "interpreter", "-k", names, *paths]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]
