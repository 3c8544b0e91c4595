"""Nsight Compute: what a row kernel moved through DRAM, beside what the traffic model says it must."""

from __future__ import annotations

import csv
import io

from benchmarks.gpu.one_call import CASES
from benchmarks.kinds.row import logits_bytes

METRICS = {
    "dram__bytes_read.sum": "read_bytes",
    "dram__bytes_write.sum": "written_bytes",
    "gpu__time_duration.sum": "nanoseconds",
}
KERNELS = "regex:cluster_row|two_pass_row|row_loss_kernel"


def command(ncu: str, target: list[str]) -> list[str]:
    """Caches are flushed before each kernel and clocks left as they are."""
    flags = ["--csv", "--clock-control", "none", "--cache-control", "all", "--metrics", ",".join(METRICS)]
    return [ncu, *flags, "--print-units", "base", "--kernel-name", KERNELS, *target]


def read(output: str) -> list[dict]:
    """One entry a launch, in the order of one_call.CASES; `passes` counts the logits' size as 1 (the floor is 2)."""
    header = output.find('"ID"')
    if header < 0:
        return []
    launches: dict[str, dict] = {}
    for line in csv.DictReader(io.StringIO(output[header:])):
        if line.get("Metric Name") in METRICS:
            launch = launches.setdefault(line["ID"], {"kernel": line["Kernel Name"]})
            launch[METRICS[line["Metric Name"]]] = float(line["Metric Value"].replace(",", ""))
    return [beside_model(case, launch) for case, launch in zip(CASES, launches.values(), strict=False)]


def beside_model(case, launch: dict) -> dict:
    one_pass = logits_bytes(case)
    moved = launch.get("read_bytes", 0.0) + launch.get("written_bytes", 0.0)
    return {
        "case": vars(case),
        **launch,
        "logits_bytes": one_pass,
        "passes": moved / one_pass,
        "over_floor": moved / (2 * one_pass),
    }
