"""Compare two result files: `python -m benchmarks.compare BEFORE.json AFTER.json`.

A change counts as one where the two spreads (p10 to p90) do not touch. Times of different machines, allocators or
clocks are not comparable; that is said, and the command then fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SAME = ("benchmark", "machine", "allocator", "clock")


@dataclass(frozen=True)
class Change:
    label: str
    name: str
    before_s: float
    after_s: float
    apart: bool  # the spreads do not touch

    @property
    def ratio(self) -> float:
        return self.after_s / self.before_s

    def verdict(self) -> str:
        if not self.apart:
            return "same"
        return "slower" if self.ratio > 1 else "faster"


def differences(before: dict, after: dict) -> list[str]:
    """Why the two files' times must not be compared, one sentence each."""
    return [f"{key} differs: {before[key]} and {after[key]}" for key in SAME if before[key] != after[key]]


def changes(before: dict, after: dict) -> Iterator[Change]:
    """Every contender timed in both files in the same case."""
    old = {(result["label"], outcome["name"]): outcome for result, outcome in _timed(before)}
    for result, new in _timed(after):
        mine = old.get((result["label"], new["name"]))
        if mine:
            apart = new["p10_s"] > mine["p90_s"] or new["p90_s"] < mine["p10_s"]
            yield Change(result["label"], new["name"], mine["median_s"], new["median_s"], apart)


def _timed(report: dict) -> Iterator[tuple[dict, dict]]:
    for result in report["results"]:
        yield from ((result, outcome) for outcome in result["outcomes"] if outcome["status"] == "timed")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    options = parser.parse_args(argv)
    before, after = (json.loads(path.read_text()) for path in (options.before, options.after))
    reasons = differences(before, after)
    for reason in reasons:
        print(f"not comparable: {reason}", file=sys.stderr)
    if reasons:
        return 1
    label = ""
    for change in changes(before, after):
        if change.label != label:
            label = change.label
            print(label)
        times = f"{change.before_s * 1e3:10.3f} ms → {change.after_s * 1e3:10.3f} ms"
        print(f"  {change.name:<44} {times}  × {change.ratio:.2f}  {change.verdict()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
