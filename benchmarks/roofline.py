"""The roofline: useful operations a second against operations a byte, under ceilings that were measured, not claimed.

The slope is what the row benchmark's floor moves (a read and a write of the logits), the plateau what the linear
benchmark's floor computes (three bare products). A loss over logits stands far left, one over hidden states far right.
A contender's intensity is that of the traffic model's passes; where its passes are not known it is left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from benchmarks import report
from benchmarks.traffic import ITEM_BYTES, linear_bytes, linear_flop, logits_bytes, row_flop
from benchmarks.verdicts import OURS, timed


class Pair(NamedTuple):
    """A row and a linear case under the same number of threads, and the files they are in."""

    row: dict
    linear: dict
    paths: list[Path]


def pair_of(paths: list[Path]) -> Pair | None:
    """The largest plain float32 cases of the files (of equals the one with most contenders); None if a kind lacks."""
    found = [(r, path) for path in paths for r in report.load(path)["results"] if _is_plain(r)]
    linear, linear_path = max((f for f in found if f[0]["benchmark"] == "linear"), key=_size, default=(None, None))
    threads = linear["case"]["threads"] if linear else None
    rows = [f for f in found if f[0]["benchmark"] == "row" and f[0]["case"]["threads"] == threads]
    row, row_path = max(rows, key=_size, default=(None, None))
    return Pair(row, linear, sorted({row_path, linear_path})) if row and linear else None


def _is_plain(result: dict) -> bool:
    case = result["case"]
    if result["benchmark"] not in ("row", "linear"):
        return False
    return (case["dtype"], case["dead"], case.get("logits", "peaked")) == ("float32", "none", "peaked")


def _size(found: tuple[dict, Path]) -> tuple[float, int]:
    return _flop(found[0]), len(timed(found[0]))


def draw(axes, pair: Pair) -> None:
    row, linear = pair.row, pair.linear
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
