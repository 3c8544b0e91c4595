"""Every verdict of docs/experiments.md once more, from the raw results alone: `python tests/benchmarks/recompute.py`.

Imports nothing of this project. Pairs and base means are pandas', Student's t is mpmath's incomplete beta function, and
Holm's correction is the closed test it is a shortcut of: a hypothesis falls when every intersection that holds it does.
Where seeds and prompts are drawn anew, they are drawn as multinomial weights and with other random numbers: such rows
say `drawn`, and agree as far as so many draws do.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from pathlib import Path

import mpmath
import numpy
import pandas
import yaml

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "experiments"
CLAIMS = ROOT / "benchmarks" / "experiments" / "claims"
USABLE = 0.01
DRAWS = 20_000

MEASURES = {
    "pass1": lambda r: r["metrics"]["pass_at"]["1"],
    "distinct": lambda r: r["metrics"]["distinct"],
    "kl": lambda r: r["metrics"].get("kl", math.nan),  # which tuning need not have
    "retention": lambda r: r["metrics"].get("retention", math.nan),
    "grad_max": lambda r: max(r["training"]["grad_norm"]) if "training" in r else math.nan,
}
PER_PROMPT = {
    "pass1": lambda r, samples: numpy.divide(r["metrics"]["right_of_each"], samples),
    "distinct": lambda r, samples: numpy.asarray(r["metrics"]["distinct_of_each"], float),
}


def tail(t: float, df: int) -> float:
    """P(T > t), Student's t."""
    half = mpmath.betainc(df / 2, 0.5, 0, df / (df + t * t), regularized=True) / 2
    return float(half if t > 0 else 1 - half)


@functools.lru_cache
def quantile(level: float, df: int) -> float:
    return float(mpmath.findroot(lambda t: tail(float(t), df) - (1 - level), 2.0, tol=1e-20))


def closed_holm(ps: list[float]) -> list[float]:
    """Adjusted p: the largest Bonferroni p of any intersection that holds the hypothesis.

    Of the intersections of one size the worst has the largest p among its members: the p and those above it.
    """
    adjusted = []
    for p in ps:
        above = sorted(other for other in ps if other >= p)
        below = sorted((other for other in ps if other < p), reverse=True)
        members = [above + below[:size] for size in range(len(below) + 1)]
        adjusted.append(min(1.0, max(len(some) * min(some) for some in members)))
    return adjusted


@functools.lru_cache
def table_of(path: Path) -> tuple[dict, pandas.DataFrame]:
    """The settings, and a line a job with every measure."""
    head, *records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    names = ("kind", "chain", "expert", "base", "seed")
    found = [{k: r[k] for k in names} | {m: of(r) for m, of in MEASURES.items()} for r in records]
    return head, pandas.DataFrame(found)


def test_of(found: pandas.DataFrame, better: str, other: str, expert: str, measure: str, runs: bool):
    """Mean, standard error and number of units, and the number of pairs."""
    known = found[found.expert.isna() | (found.expert == expert)].set_index(["base", "seed"])
    d = (known[known.chain == better][measure] - known[known.chain == other][measure]).dropna()
    units = d if runs else d.groupby("base").mean()
    return units.mean(), units.sem(), len(units), len(d)


def p_of(value: float, error: float, n: int, expect: str, margin: float) -> float:
    if not error > 0:
        return math.nan
    at = {"more": [0.0], "less": [0.0], "not-inferior": [-margin], "equal": [-margin, margin]}[expect]
    tails = [tail((value - bound) / error, n - 1) for bound in at]
    return max(tails[0], 1 - tails[1]) if expect == "equal" else 2 * min(tails[0], 1 - tails[0])


def drawn_anew(path: Path, better: str, other: str, expert: str, measure: str) -> numpy.ndarray:
    """The mean difference for every draw of seeds and prompts."""
    head, *records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    samples, arms = head["study"]["evaluation"]["samples"], []
    for chain in (better, other):
        runs = [r for r in records if (r["kind"], r["chain"]) == ("run", chain) and r["expert"] in (None, expert)]
        arms.append({r["seed"]: PER_PROMPT[measure](r, samples) for r in runs})
    found_SP = numpy.array([arms[0][seed] - arms[1][seed] for seed in sorted(arms[0].keys() & arms[1].keys())])
    random = numpy.random.RandomState(7)
    weights = [random.multinomial(n, numpy.full(n, 1 / n), DRAWS) / n for n in found_SP.shape]
    return numpy.einsum("ds,sp,dp->d", weights[0], found_SP, weights[1], optimize=True)


def p_of_draws(draws: numpy.ndarray, expect: str, margin: float) -> float:
    if not draws.std() > 0:
        return math.nan
    most, least = ((1 + (side * draws <= side * bound).sum()) / (1 + len(draws)) for side, bound in
                   ((1, -margin), (-1, margin if expect == "equal" else -margin)))  # fmt: skip
    return max(most, least) if expect == "equal" else min(1.0, 2 * min(most, least))


def word(p: float, value: float, expect: str, margin: float) -> str:
    if math.isnan(p):
        return "not testable here"
    if p >= 0.05:
        return "not shown"
    rises = expect == "equal" or (value < 0 if expect == "less" else value + margin > 0)
    return "held" if rises else "did not hold: the opposite"


def claims_of(path: Path) -> list[dict]:
    head, _ = table_of(path)
    return head["claims"]["entries"] if "claims" in head else yaml.safe_load((CLAIMS / "exploratory.yaml").read_text())


def verdicts(path: Path, expert: str, weak: bool = False, first: bool = False) -> list[dict]:
    """One row a comparison, in the order of the page. weak: over every base. first: as the study was read at first."""
    head, found = table_of(path)
    grid = set(itertools.chain(*(cells["bases"] for cells in head["study"]["grid"])))
    bases = found[(found.kind == "base") & found.base.isin(grid)]
    limit = head["study"]["least_base"] if first else USABLE
    kept = bases[weak | (bases.pass1 >= limit)].base
    runs = found[(found.kind == "run") & found.base.isin(kept)]
    rows = []
    for entry in claims_of(path):
        for better, other in entry.get("pairs", []):
            expect, margin = entry["expect"], entry.get("margin", 0.0)
            if first and margin:
                continue
            over_units = head["study"].get("unit", "bases") == "bases"
            value, error, n, pairs = test_of(runs, better, other, expert, entry["measure"], first or not over_units)
            row = {"claim": entry["claim"], "value": value, "error": error, "bases": n, "pairs": pairs,
                   "expect": expect, "margin": margin, "p": p_of(value, error, n, expect, margin)}  # fmt: skip
            if not over_units and entry["measure"] in PER_PROMPT:
                draws = drawn_anew(path, better, other, expert, entry["measure"])
                low, high = numpy.quantile(draws, [0.025, 0.975])
                row |= {"drawn": True, "low": low, "high": high, "p": p_of_draws(draws, expect, margin)}
            rows.append(row)
    tested = [row for row in rows if not math.isnan(row["p"])]
    if not first:
        for row, p in zip(tested, closed_holm([row["p"] for row in tested]), strict=True):
            row["p"] = p
    for row in rows:
        if not row.get("drawn"):
            half = quantile(0.975, row["bases"] - 1) * row["error"] if row["bases"] > 1 else math.nan
            row |= {"low": row["value"] - half, "high": row["value"] + half}
        row["said"] = word(row["p"], row["value"], row["expect"], row["margin"])
    return rows


if __name__ == "__main__":
    for path in sorted(RESULTS.glob("*.jsonl")):
        head, found = table_of(path)
        for expert in sorted(found.expert.dropna().unique()):
            print(f"\n{path.stem}, {expert}")
            print(pandas.DataFrame(verdicts(path, expert)).to_string(float_format="{:+.4f}".format))
