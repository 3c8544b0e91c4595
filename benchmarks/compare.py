"""Compare two result files: `gft bench --compare A.json B.json [--ratios]`.

Times: a change counts as one where the two spreads (p10 to p90) do not touch. Times of different machines, allocators
or clocks are not comparable; that is said, and the command then fails.

Ratios (--ratios): what a committed file claims is each contender's time over the floor in the same round. Two runs
agree where no such ratio differs by more than a factor of --tolerance; the command fails where one does. The machines
may differ, the cases must not.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import report
from benchmarks.verdicts import timed

SAME = ("benchmark", "machine", "allocator", "clock")
TOLERANCE = 1.5


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


@dataclass(frozen=True)
class Claim:
    """One contender's time over the floor, then and now."""

    label: str
    name: str
    before: float
    after: float

    @property
    def factor(self) -> float:
        return max(self.after / self.before, self.before / self.after)


def differences(before: dict, after: dict) -> list[str]:
    """Why the two files' times must not be compared, one sentence each."""
    return [f"{key} differs: {before[key]} and {after[key]}" for key in SAME if before[key] != after[key]]


def changes(before: dict, after: dict) -> Iterator[Change]:
    """Every contender timed in both files in the same case."""
    for label, mine, new in _in_both(before, after):
        apart = new["p10_s"] > mine["p90_s"] or new["p90_s"] < mine["p10_s"]
        yield Change(label, new["name"], mine["median_s"], new["median_s"], apart)


def claims(before: dict, after: dict) -> Iterator[Claim]:
    """Every ratio to the floor that both files have; the floors' own are 1."""
    for label, mine, new in _in_both(before, after):
        if mine["objective"] is not None and mine["over_floor"] and new["over_floor"]:
            yield Claim(label, new["name"], mine["over_floor"], new["over_floor"])


def _in_both(before: dict, after: dict) -> Iterator[tuple[str, dict, dict]]:
    old = {(result["label"], outcome["name"]): outcome for result, outcome in _timed(before)}
    for result, new in _timed(after):
        mine = old.get((result["label"], new["name"]))
        if mine:
            yield result["label"], mine, new


def _timed(saved: dict) -> Iterator[tuple[dict, dict]]:
    for result in saved["results"]:
        yield from ((result, outcome) for outcome in timed(result))


def compare(before: Path, after: Path, *, ratios: bool = False, tolerance: float = TOLERANCE) -> int:
    """Print what changed. Returns 0, or 1 where the files are not comparable or a ratio does not reproduce."""
    for path in (before, after):
        if not path.is_file():
            print(f"--compare must name two result files, got {path}; there is no such file.", file=sys.stderr)
            return 2
    old, new = report.load(before), report.load(after)
    return _compare_ratios(old, new, tolerance) if ratios else _compare_times(old, new)


def _compare_times(old: dict, new: dict) -> int:
    reasons = differences(old, new)
    for reason in reasons:
        print(f"not comparable: {reason}", file=sys.stderr)
    if reasons:
        return 1
    lines = ((c, f"{c.before_s * 1e3:10.3f} ms → {c.after_s * 1e3:10.3f} ms  × {c.ratio:.2f}  {c.verdict()}")
             for c in changes(old, new))  # fmt: skip
    _print_by_case(lines)
    return 0


def _compare_ratios(old: dict, new: dict, tolerance: float) -> int:
    found = list(claims(old, new))
    if not found:
        print("not comparable: the two files have no case and contender in common", file=sys.stderr)
        return 1
    broken = [claim for claim in found if claim.factor > tolerance]
    verdicts = {True: "DIFFERS", False: "same"}
    _print_by_case((c, f"{c.before:7.2f} × floor → {c.after:7.2f} × floor  {verdicts[c in broken]}") for c in found)
    print(f"{len(found) - len(broken)} of {len(found)} ratios agree within a factor of {tolerance:g}")
    return 1 if broken else 0


def _print_by_case(lines: Iterator[tuple[Change | Claim, str]]) -> None:
    label = ""
    for entry, text in lines:
        if entry.label != label:
            label = entry.label
            print(label)
        print(f"  {entry.name:<44} {text}")
