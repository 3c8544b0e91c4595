"""The benchmarks by name, a file each: its cases and which of them run, its inputs and their check, its contenders.

A new peer is one entry of `PEERS` in the file of its kind.
"""

from __future__ import annotations

from benchmarks.kinds import advantages, linear, log_probs, prompts, row, shards, step
from benchmarks.kinds.kind import Kind

KINDS: dict[str, Kind] = {
    "row": row.KIND,
    "linear": linear.KIND,
    "log-probs": log_probs.KIND,
    "advantages": advantages.KIND,
    "shards": shards.KIND,
    "step": step.KIND,
    "prompts": prompts.KIND,
}

SWEEPS = {
    "vocabulary": ("row", row.vocabulary_sweep),
    "live": ("linear", linear.live_sweep),
    "sparse": ("linear", linear.sparse_sweep),
    "memory": ("row", row.memory_cases),
    "pretrained": ("step", step.pretrained_sweep),
    "gpu": ("row", row.gpu_sweep),
    "gpu-small": ("row", row.small_sweep),
    "gpu-linear": ("linear", linear.gpu_sweep),
}
"""Cases and the kind they are of: those that a plot is drawn from, in the order of what is swept, a real model's, a
GPU's."""
WEIGHED = ("memory", "pretrained")
