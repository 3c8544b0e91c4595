"""Peak memory of one step beyond its inputs.

CPU: a fresh process makes the inputs, takes one step to load and start everything, resets the kernel's high-water
mark of resident memory, takes the step again and reports by how much the mark rose. The allocator there gives every
block of 128 KiB or more back as soon as it is freed; with freed blocks kept, a peak would hide in them.
CUDA: the caching allocator's own peak, in this process.

Also the longest sequence whose step stays within a budget. Peak memory is nearly a straight line in the number of
tokens, so a line through two measured peaks says where the budget ends; that length is measured in its turn, and the
line drawn again, until a length that fits and one that does not lie close together. No limit is imposed on anyone, so
what is found does not depend on how a library behaves when memory runs out.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.clocks import Step
from benchmarks.kinds import KINDS
from benchmarks.provenance import default_allocator_environment

# a fixed threshold: glibc otherwise raises it to the largest block ever freed, and then keeps blocks
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


class NotMeasuredError(RuntimeError):
    """Peak memory could not be measured; the message says why."""


def peak_extra_bytes(kind: str, case, name: str) -> int:
    """Bytes that `name` needs in one step beyond the inputs, at its peak.

    kind: one of benchmarks.kinds. name: of a contender that has passed its check. Raises NotMeasuredError.
    """
    if case.device == "cuda":
        return _peak_cuda(kind, case, name)
    command = [sys.executable, "-m", "benchmarks.memory", kind, json.dumps(asdict(case)), name]
    environment = default_allocator_environment() | GIVE_BACK
    root = Path(__file__).parent.parent
    child = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if child.returncode:
        raise NotMeasuredError((child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1][:160])
    return int(child.stdout.splitlines()[-1])


def _peak_cuda(kind: str, case, name: str) -> int:
    step = _settled_step(kind, case, name)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = step()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


def _settled_step(kind: str, case, name: str) -> Step:
    """A contender's step after a first one, for what only that allocates, and with the inputs as they were."""
    problem = KINDS[kind].build(case)
    step = KINDS[kind].contender(problem, name).step
    problem.prepare(case.upstream)
    step()
    problem.prepare(case.upstream)
    gc.collect()
    return step


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


GRAIN = 4  # tokens
CLOSE = 0.05  # a length that fits is good enough if one that is larger by this share does not
PROBES = 8


class Found(NamedTuple):
    """tokens: the longest length that was measured to fit, 0 for none. peaks: (tokens, bytes) as they were measured."""

    tokens: int
    peaks: list[tuple[int, int]]


def longest(peak: Callable[[int], int], budget_bytes: int, start: int = 8 * GRAIN) -> Found:
    """peak: bytes at a number of tokens. Lengths are multiples of GRAIN."""
    measured: dict[int, int] = {}
    tokens = start
    for _ in range(PROBES):
        measured[tokens] = peak(tokens)
        fits = max((t for t, b in measured.items() if b <= budget_bytes), default=0)
        fails = min((t for t, b in measured.items() if b > budget_bytes), default=None)
        if fails is not None and fails - fits <= max(GRAIN, CLOSE * fits):
            break
        tokens = _next(measured, budget_bytes, fits, fails)
    return Found(fits, sorted(measured.items()))


def _next(measured: dict[int, int], budget_bytes: int, fits: int, fails: int | None) -> int:
    """Where the line through the two peaks nearest to the budget meets it, between what fits and what fails."""
    if len(measured) == 1:
        return 2 * fits if fits else GRAIN
    (a, peak_a), (b, peak_b) = sorted(measured.items(), key=lambda entry: abs(entry[1] - budget_bytes))[:2]
    slope = (peak_b - peak_a) / (b - a)
    guess = 2 * max(measured) if slope <= 0 else int(a + (budget_bytes - peak_a) / slope)
    guess = guess // GRAIN * GRAIN
    if fails is not None:
        return min(max(guess, fits + GRAIN), fails - GRAIN)
    if guess > fits * (1 + CLOSE):
        return max(fits + GRAIN, min(guess, 64 * fits))
    # past the guess by a little, so that one side of it is known to fail
    return fits + max(GRAIN, int(CLOSE * fits) // GRAIN * GRAIN)


def main() -> None:
    kind, case_json, name = sys.argv[1:]
    case = KINDS[kind].case(**json.loads(case_json))
    torch.set_num_threads(case.threads)
    step = _settled_step(kind, case, name)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    before = _status_bytes("VmRSS")
    kept = step()
    extra = max(0, _status_bytes("VmHWM") - before)
    del kept
    print(extra)


if __name__ == "__main__":
    main()
