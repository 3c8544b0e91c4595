"""What a study's runs say of its claims: one finding a comparison, corrected for all of its table, and the tables."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from benchmarks.experiments import statistics
from benchmarks.experiments.claims import EXPECTATIONS, Claim, Comparison
from benchmarks.experiments.measures import MEASURES
from benchmarks.experiments.methods import label_of
from benchmarks.experiments.results import Results
from benchmarks.experiments.statistics import HELD, NOT_TESTABLE, OPPOSITE, Difference, holm, p_value
from benchmarks.tables import markdown

PER_PROMPT = {"pass1": ("right_of_each", True), "distinct": ("distinct_of_each", False)}


@dataclass(frozen=True)
class Finding:
    """A comparison, what its pairs say, and what is decided by it. missing: planned pairs that are not there."""

    claim: Claim
    comparison: Comparison
    difference: Difference
    p: float
    said: str
    missing: int


def findings(results: Results, expert: str, bases: Collection[int] | None = None, old: bool = False) -> list[Finding]:
    """Every comparison over these bases (None: the usable ones), Holm's correction over all that could be tested.

    old: as the first studies were read: every run a unit, the bases above a threshold of each study, no correction.
    """
    bases = set(results.usable if bases is None else bases)
    if old and results.published is not None:
        bases = set(results.published)
    pairs = [(claim, c) for claim in results.claims for c in claim.comparisons if not (old and c.margin)]
    differences = [_difference(results, c, expert, bases, old) for _, c in pairs]
    ps = [p_value(d, c.expect, c.margin) for d, (_, c) in zip(differences, pairs, strict=True)]
    found = []
    for (claim, c), d, p in zip(pairs, differences, ps if old else holm(ps), strict=True):
        said, missing = statistics.verdict(d, c.expect, c.margin, p), _planned(results, c, expert, bases) - d.pairs
        found.append(Finding(claim, c, d, p, said, missing))
    return found


def _difference(results: Results, comparison: Comparison, expert: str, bases: set[int], runs: bool) -> Difference:
    arms = [results.of(chain, expert, bases) for chain in (comparison.better, comparison.other)]
    if results.study.unit == "bases" or comparison.measure not in PER_PROMPT:
        return statistics.paired(*arms, MEASURES[comparison.measure].of, runs or results.study.unit != "bases")
    name, share = PER_PROMPT[comparison.measure]
    scale = results.study.evaluation.samples if share else 1
    if min(map(len, arms)) < 2:
        return statistics.OverUnits(math.nan, 0, 0, math.nan)
    return statistics.over_seeds_and_prompts(*arms, lambda record: [n / scale for n in record["metrics"][name]])


def _planned(results: Results, comparison: Comparison, expert: str, bases: set[int]) -> int:
    """How many pairs of the comparison the study plans on these bases."""
    planned = [results.planned_runs(chain, expert) for chain in (comparison.better, comparison.other)]
    return sum(base in bases for base, _ in planned[0] & planned[1])


def summary_table(results: Results, experts: Sequence[str]) -> str:
    """A line a claim; for an exploratory study each expert twice: as read at first, and now."""
    twice = results.published is not None
    heads = [head for e in experts for head in ([f"`{e}`, at first", f"`{e}`, corrected"] if twice else [f"`{e}`"])]
    readings = [findings(results, e, old=old) for e in experts for old in ([True, False] if twice else [False])]
    lines = [
        [claim.text, claim.origin, *(short([f for f in reading if f.claim == claim]) for reading in readings)]
        for claim in results.claims if claim.comparisons
    ]  # fmt: skip
    return markdown(["claim", "origin", *heads], lines)


def short(found: Sequence[Finding]) -> str:
    """One word for all comparisons of a claim, or how many of them held; and how many could be made."""
    if not found:
        return "–"
    decided = [f.said for f in found if f.said != NOT_TESTABLE]
    if not decided:
        return NOT_TESTABLE
    if len(set(decided)) == 1:
        said = emphasised(decided[0])
    else:
        said = "; ".join(f"{one} in {decided.count(one)} of {len(decided)}" for one in dict.fromkeys(decided))
    return said if len(decided) == len(found) else f"{said}; compared with {len(decided)} of {len(found)} planned"


def emphasised(said: str) -> str:
    return f"**{said}**" if said in (HELD, OPPOSITE) else said


def full_table(results: Results, expert: str) -> str:
    """Every comparison with its interval, its corrected p, what could have been found, and the same over all bases."""
    head = ("claim", "compared", "difference [95 %]", "bases", "pairs", "p, corrected", "80 % power from", "verdict")
    if results.study.unit != "bases":
        head = (*head[:3], "seeds", *head[4:])
    every = findings(results, expert, results.bases) if results.weak else None
    head = (*head, "with the weak bases") if every else head
    lines = []
    for number, found in enumerate(findings(results, expert)):
        cells = _cells(found)
        if every:
            other = every[number]
            more = other.difference.units > found.difference.units
            shown = f"{difference_of(other.difference)}, {other.difference.units} bases: {emphasised(other.said)}"
            cells.append(shown if more else "no runs")
        lines.append(cells)
    return markdown(head, lines, "lllrrrrl")


def _cells(found: Finding) -> list[str]:
    d = found.difference
    pairs = f"{d.pairs} of {d.pairs + found.missing}" if found.missing else str(d.pairs)
    return [found.claim.text, compared(found.comparison), difference_of(d), str(d.units), pairs,
            _number(found.p, ".3g"), _number(d.detectable(), ".3f"), emphasised(found.said)]  # fmt: skip


def compared(one: Comparison) -> str:
    expected = EXPECTATIONS[one.expect].format(one.margin)
    return f"{MEASURES[one.measure].title}: {label_of(one.better)} against {label_of(one.other)}, {expected}"


def difference_of(found: Difference) -> str:
    low, high = found.interval()
    return _number(found.value, "+.3f") + ("" if math.isnan(low) else f" [{low:+.3f}, {high:+.3f}]")


def _number(value: float, form: str) -> str:
    return "–" if math.isnan(value) else f"{value:{form}}"


def undecided(results: Results) -> str:
    """The claims that no run of the study decides, with the reason."""
    lines = [f"- *{claim.text}* ({claim.origin}): {claim.why_not}." for claim in results.claims if claim.why_not]
    return "\n".join(["Not decided by runs of this study:\n", *lines]) + "\n" if lines else ""
