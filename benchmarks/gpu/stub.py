"""A stand-in for the GPU: `python -m benchmarks.gpu.stub STAGE COMMAND...` does what COMMAND would leave behind.

GFT_STUB injects failures, as STAGE=KIND separated by commas: fail (exit status 3 after a part of the results), oom and
sticky (so do their messages), hang (deaf to SIGINT, with a child), silent (no output), missing (no such program), flood
(100 MB of output), torn (a result file that breaks off).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu.programs import append

MESSAGES = {
    "oom": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.32 GiB.",
    "sticky": "torch.AcceleratorError: CUDA error: an illegal memory access was encountered",
}


def main(stage: str, command: list[str]) -> int:
    faults = dict(entry.split("=") for entry in os.environ.get("GFT_STUB", "").split(",") if entry)
    fault = faults.get(stage)
    if fault == "missing":
        return 127
    if fault != "silent":
        leave_behind(command, partly=fault is not None)
    if fault == "hang":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        subprocess.run([sys.executable, "-c", "import time; time.sleep(600)", *command])
        time.sleep(600)
    for _ in range(100 if fault == "flood" else 0):
        print("x" * 1_000_000)
    if fault == "torn":
        file = Path(next(word for word in command if word.endswith((".json", ".jsonl"))))
        file.write_bytes(file.read_bytes()[:-40])
    if fault in MESSAGES:
        print(MESSAGES[fault])
    return 3 if fault in ("fail", "torn", *MESSAGES) else 0


def leave_behind(command: list[str], partly: bool) -> None:
    if "--save" in command:
        benchmark(Path(command[command.index("--save") + 1]), command[command.index("--sweep") + 1], partly)
    elif "benchmarks.gpu.lines" in command:
        tests(Path(command[3]), command[4 : command.index("--device")], partly)
    elif "ncu" in command:
        profile()
    else:
        machine = {"gpu": "a stub", "home": os.access(os.environ["HOME"], os.W_OK)}
        commit = {"revision": os.environ.get("GFT_COMMIT"), "dirty": False}
        print(json.dumps({"machine": machine, "versions": {}, "commit": commit, "nvidia_smi": "580.0, 1980 MHz"}))


def benchmark(file: Path, sweep: str, partly: bool) -> None:
    """A report of two cases as the real command would save it, a case at a time; no torch, which takes long to load."""
    kind = "linear" if "linear" in sweep else "row"
    floor = {"name": "floor", "status": "timed", "rounds": 1, "median_s": 1e-3, "p10_s": 1e-3, "p90_s": 1e-3}
    ours = {**floor, "name": f"gft_{kind}_loss cuda", "objective": "gft", "median_s": 1.2e-3, "over_floor": 1.2}
    lost = {"name": "quack", "status": "failed", "objective": "gft", "why": "OutOfMemoryError: a rehearsal"}
    results = []
    for vocab in (151936,) if partly else (151936, 128256):
        case = {"rows": 8192, "vocab": vocab, "dtype": "bfloat16", "device": "cuda"}
        case |= {"hidden": 4096} if kind == "linear" else {}
        results.append({"benchmark": kind, "case": case, "label": f"8192 × {vocab} {kind}", "input_bytes": 1,
                        "outcomes": [floor, ours, lost]})  # fmt: skip
        file.write_text(json.dumps({"results": results}))


def tests(file: Path, paths: list[str], partly: bool) -> None:
    said = {"outcome": "failed" if partly else "passed", "seconds": 0.1, "why": "E   assert 1 == 2" * partly}
    for path in paths:
        append(file, {"test": f"{path}::test", **said})


def profile() -> None:
    print('==PROF== Connected\n"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"')
    one_pass = 4096 * 151936 * 2
    for metric, value in (("dram__bytes_read.sum", one_pass), ("dram__bytes_write.sum", one_pass),
                          ("smsp__issue_active.avg.pct_of_peak_sustained_active", 71)):  # fmt: skip
        print(f'"0","7","void cluster_row<Bf16, 0>(RowTask, int)","{metric}","","{value:,}"')


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
