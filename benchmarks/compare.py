"""Compare two result files: `python -m benchmarks --compare A.json B.json [--ratios]`.

Times: a change counts as one where the two spreads (p10 to p90) do not touch. Times of different machines, allocators
or clocks are not comparable; that is said, and the command then fails.

Ratios (--ratios) are what a machine can reproduce: how many times as fast as each contender our best entry was, among
those that computed the same thing in the same case. A ratio has the spread of its two contenders' times. It holds where
B's reaches A's within that spread and the tolerance of its kind (`TOLERANCE`); more than was claimed holds as well. The
command fails where one does not. Floors take no part: they are bytes or products, and their share differs by machine.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks import report
from benchmarks.report import best_of_ours, is_ours, timed

SAME = ("machine", "allocator", "clock")
TOLERANCE = {
    # Both sides spend their time in the same matrix products, which cancel; what is left is the share of other passes.
    **dict.fromkeys(("linear", "log-probs", "step", "prompts"), 1.25),
    # A peer is bound by bytes where ours is bound by instructions; machines of one instruction set differ by about two
    # in bytes a second against vector instructions a second.
    **dict.fromkeys(("row", "shards"), 2.0),
    # Fixed costs of calls: how fast Python and torch's dispatcher run against each other's C++.
    "advantages": 2.0,
}
NATIVE_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}


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

    def __str__(self) -> str:
        times = f"{self.before_s * 1e3:10.3f} ms → {self.after_s * 1e3:10.3f} ms"
        return f"{times}  × {self.ratio:.2f}  {self.verdict()}"


class Ratio(NamedTuple):
    """A contender's time over our best entry's, with what the two spreads leave open."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Claim:
    """How many times as fast as a contender our best entry was, then and now."""

    label: str
    name: str
    before: Ratio
    after: Ratio
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.after.high * self.tolerance >= self.before.low

    def __str__(self) -> str:
        said = "holds" if self.holds else f"DIFFERS by more than spread and {self.tolerance:g} ×"
        return f"{self.before.median:7.2f} × ours → {self.after.median:7.2f} × ours  {said}"


def differences(before: dict, after: dict) -> list[str]:
    """Why the two files' times must not be compared, one sentence each."""
    return [f"{key} differs: {before[key]} and {after[key]}" for key in SAME if before[key] != after[key]]


def changes(before: dict, after: dict) -> Iterator[Change]:
    """Every contender timed in both files in the same case."""
    for old, new in _in_both(before, after):
        mine = {outcome["name"]: outcome for outcome in timed(old)}
        for o in timed(new):
            if was := mine.get(o["name"]):
                apart = o["p10_s"] > was["p90_s"] or o["p90_s"] < was["p10_s"]
                yield Change(new["label"], o["name"], was["median_s"], o["median_s"], apart)


def claims(before: dict, after: dict) -> Iterator[Claim]:
    """Every ratio that both files have, except for bfloat16 where one machine has instructions for it and one not."""
    sets = [NATIVE_BF16 & set(saved["machine"].get("instruction_sets", ())) for saved in (before, after)]
    for old, new in _in_both(before, after):
        if new["case"].get("dtype") == "bfloat16" and bool(sets[0]) != bool(sets[1]):
            continue
        then, now = _ratios(old), _ratios(new)
        for name in (name for name in then if name in now):
            yield Claim(new["label"], name, then[name], now[name], TOLERANCE[new["benchmark"]])


def _ratios(result: dict) -> dict[str, Ratio]:
    """Everyone else who computed what our best entry did, by name."""
    ours = best_of_ours(result)
    return {
        o["name"]: Ratio(o["median_s"] / ours["median_s"], o["p10_s"] / ours["p90_s"], o["p90_s"] / ours["p10_s"])
        for o in timed(result) if ours and not is_ours(o) and o["objective"] == ours["objective"]
    }  # fmt: skip


def _in_both(before: dict, after: dict) -> Iterator[tuple[dict, dict]]:
    old = {result["label"]: result for result in before["results"]}
    return ((old[result["label"]], result) for result in after["results"] if result["label"] in old)


def compare(before: Path, after: Path, *, ratios: bool = False) -> int:
    """Print what changed. Returns 0, or 1 where the files are not comparable or a ratio does not reproduce."""
    both = report.load(before), report.load(after)
    found: list[Change] | list[Claim] = list(claims(*both)) if ratios else list(changes(*both))
    reasons = differences(*both)
    if ratios:
        reasons = [] if found else ["the two files have no case and contender in common"]
    for reason in reasons:
        print(f"not comparable: {reason}", file=sys.stderr)
    if reasons:
        return 1
    for label, entries in itertools.groupby(found, lambda entry: entry.label):
        print(label, *(f"  {entry.name:<44} {entry}" for entry in entries), sep="\n")
    if not ratios:
        return 0
    holding = sum(claim.holds for claim in found)
    print(f"{holding} of {len(found)} ratios hold")
    return 0 if holding == len(found) else 1
