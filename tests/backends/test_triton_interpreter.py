"""The Triton kernels without a GPU: the tests below run again in a process where Triton interprets its kernels.

Triton decides between compiler and interpreter when a kernel is defined, hence a process of its own. Left out are
bfloat16 (the interpreter truncates where a GPU rounds), rows too long for Python, repetition, most of float16, what
does not depend on the backend, and one softcap case in float32, where one unit in the last place of tanh is 2.1e-6 for
a limit of 2e-6.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
LEFT_OUT = (
    "bfloat16", "32000", "50257", "65537", "129920", "151936", "262144", "twenty_runs", "module", "compiles", "opcheck",
    "lengths", "autocast", "0.6-30.0-torch.float32",
)  # fmt: skip
SLOW = "not (float16 and (tau or softcap or per_row or poison or strides or statistics or peaked))"
POLICY = (  # each of these reads two dozen rows: some for all objectives, the edges for those that have them
    "float32 and every_objective or edge or overflows or banned or scaler and 0.5 or bad_live and old"
    " or lengths and cispo or (masked or without) and dapo"
)
PARTS = {
    "formulas": ["backends/interpreter/formulas_agree.py"],
    "rows": ["backends/interpreter/rows.py"],
    "shards": ["backends/interpreter/shards.py"],
    "loss": ["loss/test_loss.py", "-k", " and ".join([SLOW, *(f"not {name}" for name in LEFT_OUT)])],
    "policy": ["loss/test_policy.py", "-k", POLICY],
    "autograd": ["loss/test_autograd.py", "-k", " and ".join(f"not {name}" for name in LEFT_OUT)],
}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (pip install triton)")
@pytest.mark.parametrize("part", PARTS)
def test_under_the_interpreter(part):
    where, *selection = PARTS[part]
    command = [sys.executable, "-m", "pytest", "-x", str(TESTS / where), "--device", "interpreter", *selection]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]
