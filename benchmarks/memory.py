"""Peak memory of one step beyond its inputs.

CPU: a fresh process makes the inputs, takes one step to load and start everything, resets the kernel's high-water
mark of resident memory, takes the step again and reports by how much the mark rose. The allocator there gives every
block of 128 KiB or more back as soon as it is freed; with freed blocks kept, a peak would hide in them.
CUDA: the caching allocator's own peak, in this process.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.harness import Absent, AbsentError
from benchmarks.provenance import default_allocator_environment

# a fixed threshold: glibc otherwise raises it to the largest block ever freed, and then keeps blocks
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


class NotMeasuredError(RuntimeError):
    """Peak memory could not be measured; the message says why."""


def peak_extra_bytes(kind: str, case, name: str) -> int:
    """Bytes that `name` needs in one step beyond the inputs, at its peak.

    kind: "row" or "linear" (benchmarks.kinds). name: of a contender that has passed its check. Raises NotMeasuredError.
    """
    if case.device == "cuda":
        return _peak_cuda(kind, case, name)
    command = [sys.executable, "-m", "benchmarks.memory", kind, json.dumps(asdict(case)), name]
    environment = default_allocator_environment() | GIVE_BACK
    root = Path(__file__).parent.parent
    child = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if child.returncode:
        raise NotMeasuredError((child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1][:160])
    return json.loads(child.stdout.splitlines()[-1])["extra_bytes"]


def _peak_cuda(kind: str, case, name: str) -> int:
    problem, step = _contender(kind, case, name)
    _settled_step(problem, step)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = step()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


def _contender(kind: str, case, name: str):
    from benchmarks.kinds import KINDS  # late: kinds imports the peers, and they import the harness

    problem = KINDS[kind].build(case)
    found = KINDS[kind].contender(problem, name)
    if isinstance(found, Absent):
        raise AbsentError(found.why)
    return problem, found.step


def _settled_step(problem, step) -> None:
    """A first step, for what only the first one allocates, and the inputs as they were."""
    problem.prepare(problem.timed_upstream)
    step()
    problem.prepare(problem.timed_upstream)
    gc.collect()


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def main() -> None:
    kind, case_json, name = sys.argv[1:]
    from benchmarks.kinds import KINDS

    case = KINDS[kind].case(**json.loads(case_json))
    torch.set_num_threads(case.threads)
    problem, step = _contender(kind, case, name)
    _settled_step(problem, step)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    before = _status_bytes("VmRSS")
    kept = step()
    extra = max(0, _status_bytes("VmHWM") - before)
    del kept
    print(json.dumps({"extra_bytes": extra, "pid": os.getpid()}))


if __name__ == "__main__":
    main()
