"""Nsight Compute over one call: what a row kernel moved through DRAM beside the traffic model, and its issue slots.

`python -m benchmarks.gpu.traffic NUMBER` makes the call of CASES[NUMBER]; one run of the profiler each, so that no
launch can be taken for another case's.
"""

from __future__ import annotations

import csv
import io
import sys

CASES = ((4096, 151936, "bfloat16"), (2048, 151936, "float32"))  # rows, vocabulary, dtype
BYTES = {"bfloat16": 2, "float32": 4}
METRICS = {
    "dram__bytes_read.sum": "read_bytes",
    "dram__bytes_write.sum": "written_bytes",
    "gpu__time_duration.sum": "nanoseconds",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue_active_percent",
}
KERNELS = "regex:cluster_row|two_pass_row|row_loss_kernel"


def command(ncu: str, number: int, python: list[str]) -> list[str]:
    """Caches are flushed before each kernel and clocks left as they are."""
    flags = ["--csv", "--clock-control", "none", "--cache-control", "all", "--metrics", ",".join(METRICS)]
    target = [*python, "-m", "benchmarks.gpu.traffic", str(number)]
    return [ncu, *flags, "--print-units", "base", "--kernel-name", KERNELS, *target]


def read(number: int, run, output: str) -> dict:
    """A launch each; `passes` counts the logits' size as 1 (the floor is 2)."""
    rows, vocabulary, dtype = CASES[number]
    header = output.find('"ID"')
    launches: dict[str, dict] = {}
    for line in csv.DictReader(io.StringIO(output[header:] if header >= 0 else "")):
        if line.get("Metric Name") in METRICS:
            launch = launches.setdefault(line["ID"], {"kernel": line["Kernel Name"]})
            launch[METRICS[line["Metric Name"]]] = float(line["Metric Value"].replace(",", ""))
    for launch in launches.values():
        moved = launch.get("read_bytes", 0.0) + launch.get("written_bytes", 0.0)
        launch["passes"] = moved / (rows * vocabulary * BYTES[dtype])
    return {"case": f"{rows} × {vocabulary} {dtype}", "launches": list(launches.values())}


def main() -> None:
    """Forward in place: the one launch that reads logits and writes their gradient."""
    import torch

    from gft_kernels import gft_loss

    rows, vocabulary, dtype = CASES[int(sys.argv[1])]
    logits = torch.randn(rows, vocabulary, device="cuda", dtype=getattr(torch, dtype)).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), device="cuda")
    gft_loss(logits * 1, targets, inplace=True, backend="cuda")
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
