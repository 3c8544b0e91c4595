"""The memory the linear loss takes beside its inputs: one chunk of logits and the head's gradient, at any length."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
V, D, CHUNK = 32000, 128, 256
LOGITS, HEAD, SLACK = CHUNK * V * 4, V * D * 4, 8 << 20  # bytes; the slack is the allocator's and the products' own

# A fresh process, so that the peak is this call's: VmHWM, reset after a small call has loaded what gets loaded once.
MEASURE = """
import sys, torch
from gft_kernels import gft_linear_loss, token_log_probs

torch.set_num_threads(1)
rows, dtype, mode, chunk, V, D = sys.argv[1], getattr(torch, sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:])
rows = int(rows)


def status(name):
    line = next(x for x in open("/proc/self/status") if x.startswith(name))
    return int(line.split()[1]) * 1024


def call(rows, V):
    hidden = torch.randn(rows, D).to(dtype).requires_grad_(mode != "frozen trunk")
    weight = torch.randn(V, D).mul_(0.05).to(dtype).requires_grad_(mode != "frozen head")
    targets = torch.arange(rows) % V
    yield
    if mode == "log-probs":
        token_log_probs(hidden, weight, targets, chunk_rows=chunk)
    else:
        (gft_linear_loss(hidden, weight, targets, chunk_rows=chunk, tau=0.2) * 0.3).backward()
    yield


list(call(64, 500))
steps = call(rows, V)
next(steps)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
next(steps)
print(status("VmHWM") - before)
"""


def peak(rows: int, dtype: str = "float32", mode: str = "all", chunk: int = CHUNK) -> int:
    command = [sys.executable, "-c", MEASURE, str(rows), dtype, mode, str(chunk), str(V), str(D)]
    environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak memory counter"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_chunk_of_logits_and_the_heads_gradient(dtype):
    """Flat in the number of rows but for the hidden gradient: 1 KB a row here, where logits would take 128 KB."""
    converted = 0 if dtype == "float32" else HEAD  # the float32 block of a half-precision head (this one fits in one)
    for rows in (512, 4096):
        per_row = rows * (3 * 4 * D + 200)
        assert peak(rows, dtype) <= LOGITS + HEAD + converted + per_row + SLACK


@pytest.mark.parametrize("mode", ["frozen head", "log-probs"])
def test_no_head_gradient_where_none_is_asked_for(mode):
    assert peak(1024, mode=mode) <= LOGITS + 1024 * (3 * 4 * D + 200) + HEAD // 2


def test_a_smaller_chunk_takes_less():
    assert peak(1024, chunk=CHUNK // 4) <= LOGITS // 4 + HEAD + 1024 * (3 * 4 * D + 200) + SLACK
