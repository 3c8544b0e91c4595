"""The roofline: useful operations a second against operations a byte, under ceilings that were measured, not claimed.

The slope is what the row benchmark's floor moves (a read and a write of the logits), the plateau what the linear
benchmark's floor computes (three bare products). A loss over logits stands far left, one over hidden states far right.
A contender's intensity is that of the traffic model's passes; where its passes are not known it is left out.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks import report
from benchmarks.traffic import ITEM_BYTES, linear_bytes, linear_flop, logits_bytes, row_flop
from benchmarks.verdicts import OURS, timed


def headlines(paths: list[Path]) -> tuple[dict, dict] | None:
    """The first float32 row case of the files, and the linear one with most contenders; None if either is missing.

    The row case of as many threads as the linear one, for their ceilings share a plot.
    """
    results = [r for path in paths for r in report.load(path)["results"]
               if r["benchmark"] in ("row", "linear") and r["case"]["dtype"] == "float32"]  # fmt: skip
    heads = [r for r in results if r["benchmark"] == "linear"]
    linear = max(heads, key=lambda r: len(timed(r)), default=None)
    rows = [r for r in results if r["benchmark"] == "row" and linear]
    row = next((r for r in rows if r["case"]["threads"] == linear["case"]["threads"]), None)
    return (row, linear) if row and linear else None


def draw(axes, paths: list[Path]) -> None:
    found = headlines(paths)
    assert found is not None
    row, linear = found
    peak_flop_s = _flop(linear) / _floor(linear)
    case = row["case"]
    bytes_s = 2 * logits_bytes(case["rows"], case["vocab"], case["dtype"]) / _floor(row)
    ridge = peak_flop_s / bytes_s
    reach = [0.3, ridge, 300 * ridge]
    axes.plot(reach, [min(x * bytes_s, peak_flop_s) / 1e9 for x in reach], color="black", linewidth=1,
              label=f"measured ceilings: {bytes_s / 1e9:.1f} GB/s, {peak_flop_s / 1e9:.0f} GFLOP/s")  # fmt: skip
    for result in (row, linear):
        for outcome in timed(result):
            intensity = _intensity(result, outcome)
            if outcome["objective"] is not None and intensity is not None:
                ours = outcome["name"].startswith(OURS)
                axes.scatter([intensity], [_flop(result) / outcome["median_s"] / 1e9], s=40 if ours else 20,
                             marker="*" if ours else "o", label=outcome["name"])  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations a byte (traffic model)")
    axes.set_ylabel("useful GFLOP/s")


def _flop(result: dict) -> float:
    case = result["case"]
    if result["benchmark"] == "row":
        return row_flop(case["rows"], case["vocab"])
    return linear_flop(case["rows"], case["hidden"], case["vocab"])


def _floor(result: dict) -> float:
    return next(o["median_s"] for o in timed(result) if o["objective"] is None)


def _intensity(result: dict, outcome: dict) -> float | None:
    case = result["case"]
    if result["benchmark"] == "linear":
        return _flop(result) / linear_bytes(case["rows"], case["hidden"], case["vocab"], case["dtype"])
    if outcome["reads"] is None:
        return None
    passes = outcome["reads"] + outcome["writes"]
    return row_flop(1, 1) / (passes * ITEM_BYTES[case["dtype"]])
