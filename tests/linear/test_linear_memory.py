"""The memory the linear loss takes beside its inputs: one chunk of logits and the head's gradient, at any length."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
V, D, CHUNK = 32000, 128, 256
LOGITS, HEAD, SLACK = CHUNK * V * 4, V * D * 4, 8 << 20  # bytes; the slack is the allocator's and the products' own

CALLS = {  # rows, dtype, mode, chunk
    "two chunks": (512, "float32", "all", CHUNK),
    "six chunks": (1536, "float32", "all", CHUNK),
    "six chunks in half precision": (1536, "bfloat16", "all", CHUNK),
    "a smaller chunk": (1024, "float32", "all", CHUNK // 4),
    "frozen head": (1024, "float32", "frozen head", CHUNK),
    "log-probs": (1024, "float32", "log-probs", CHUNK),
}

# A process of its own, so that a peak is one call's: VmHWM, reset after a small call has loaded what gets loaded once.
MEASURE = """
import json, sys, torch
from gft_kernels import gft_linear_loss, token_log_probs

torch.set_num_threads(1)
calls, V, D = json.loads(sys.argv[1])


def status(name):
    line = next(x for x in open("/proc/self/status") if x.startswith(name))
    return int(line.split()[1]) * 1024


def call(V, rows, dtype, mode, chunk):
    dtype = getattr(torch, dtype)
    hidden = torch.randn(rows, D).to(dtype).requires_grad_()
    weight = torch.randn(V, D).mul_(0.05).to(dtype).requires_grad_(mode != "frozen head")
    targets = torch.arange(rows) % V
    yield
    if mode == "log-probs":
        token_log_probs(hidden, weight, targets, chunk_rows=chunk)
    else:
        (gft_linear_loss(hidden, weight, targets, chunk_rows=chunk, tau=0.2) * 0.3).backward()
    yield


peaks = {}
for name, (rows, *options) in calls.items():
    list(call(500, 64, *options))
    steps = call(V, rows, *options)
    next(steps)
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    next(steps)
    peaks[name] = status("VmHWM") - before
    del steps
print(json.dumps(peaks))
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak memory counter")


@pytest.fixture(scope="module")
def peaks() -> dict[str, int]:
    """Bytes at the peak of each call beside what was there before it. What one call frees, the next has to ask for."""
    environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "MALLOC_ARENA_MAX": "1",
                   "MALLOC_MMAP_THRESHOLD_": str(1 << 17)}  # fmt: skip
    command = [sys.executable, "-c", MEASURE, json.dumps([CALLS, V, D])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def of_rows(name: str) -> int:
    """The hidden gradient's part: 1 KB a row here, where logits would take 128 KB."""
    return CALLS[name][0] * (3 * 4 * D + 200)


@pytest.mark.parametrize("name", ["two chunks", "six chunks", "six chunks in half precision"])
def test_a_chunk_of_logits_and_the_heads_gradient(peaks, name):
    """Flat in the number of rows but for the hidden gradient."""
    converted = HEAD if "half" in name else 0  # the float32 block of a half-precision head (this one fits in one)
    assert peaks[name] <= LOGITS + HEAD + converted + of_rows(name) + SLACK


@pytest.mark.parametrize("name", ["frozen head", "log-probs"])
def test_no_head_gradient_where_none_is_asked_for(peaks, name):
    assert peaks[name] <= LOGITS + of_rows(name) + HEAD // 2


def test_a_smaller_chunk_takes_less(peaks):
    assert peaks["a smaller chunk"] <= LOGITS // 4 + HEAD + of_rows("a smaller chunk") + SLACK
