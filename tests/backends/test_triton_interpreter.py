"""The Triton kernels without a GPU: their own tests, and what the losses' tests ask of a backend, interpreted.

Triton decides between compiler and interpreter when a kernel is defined, hence a process of its own; one, for it takes
five seconds to begin.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SELECTED = {  # `-k`, by file
    # not bfloat16 (the interpreter truncates where a GPU rounds), rows too long for Python, repetition, float16 beyond
    # its range, and what does not depend on the backend; the scaler is policy_loss's, on shorter rows
    "test_loss.py": "not (bfloat16 or 32000 or 50257 or 65537 or 129920 or 151936 or 262144 or twenty_runs or module"
    " or means_and or advantages_given or shuffling or ragged and not reward-std or 10000000000 or scaler)",
    # each of these reads two dozen rows: some for all objectives but those that are another's with other numbers, the
    # edges for those that have them
    "test_policy.py": "float32 and (every_objective and penalties and not (dft or bnpo or dapo or dr_grpo)"
    " or within_bounds and dapo) or edge or overflows or banned or scaler and 0.5 or own_numbers"
    " or given_rows and (luffy or rectified) or row_weights and token-mean or ratios_of_responses and padded"
    " or bad_live and old or lengths and cispo or (masked or without) and dapo or 200_nats or peaked_rows or negative",
    # whose memory is written, and when; which derivatives are refused, the operators decide
    "test_autograd.py": "retained_graph or logits_storage or leaves_the_logits_alone or adds_to_what"
    " or checkpointing or nothing_is_materialised or callers_own",
    "test_measures.py": "not bfloat16",
    "test_sparse.py": "left_out_is_bounded and (steep or softcap)",
    "formulas_agree.py": "test",
    "rows.py": "test",
}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (pip install triton)")
def test_under_the_interpreter():
    own = [f"backends/interpreter/{name}.py" for name in ("formulas_agree", "rows")]
    loss = [f"loss/test_{name}.py" for name in ("autograd", "loss", "policy")]
    linear = [f"linear/test_{name}.py" for name in ("measures", "sparse")]
    paths = [f"tests/{path}" for path in (*own, *loss, *linear)]
    names = " or ".join(f"{file} and ({chosen})" for file, chosen in SELECTED.items())
    command = [sys.executable, "-m", "pytest", "-x", "--device", "interpreter", "-k", names, *paths]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]
