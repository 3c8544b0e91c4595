"""Means with standard errors; paired differences over base models, or over seeds and prompts; what they decide.

Seeds of one base share its weights, so that runs are not independent: the mean over a base's seeds is one observation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy
from scipy import stats

HELD, OPPOSITE, NOT_SHOWN, NOT_TESTABLE = "held", "did not hold: the opposite", "not shown", "not testable here"
LEVEL, POWER = 0.05, 0.8
DRAWS = 10_000


@dataclass(frozen=True)
class Mean:
    """The mean of n values and its standard error; the error is NaN for n = 1, all is NaN for n = 0."""

    value: float
    error: float
    n: int


def mean(values: Sequence[float]) -> Mean:
    n = len(values)
    if n == 0:
        return Mean(math.nan, math.nan, 0)
    value = math.fsum(values) / n  # `sum` rounds otherwise before Python 3.12 than from it on
    if n == 1:
        return Mean(value, math.nan, 1)
    return Mean(value, math.sqrt(math.fsum((x - value) ** 2 for x in values) / (n - 1) / n), n)


@dataclass(frozen=True)
class Difference:
    """What the pairs of two arms say of the mean of their difference.

    units: independent observations, by default bases. pairs: runs that share base and seed. tails(bound): one-sided p
    of "the true mean is at most `bound`" and of "at least". interval(): at 95 %. detectable(): the true difference that
    as many units find with a chance of 80 %, by the spread seen, two-sided at 5 %. NaN where nothing can be said.
    """

    value: float
    units: int
    pairs: int


@dataclass(frozen=True)
class OverUnits(Difference):
    """Student's t over the means of `units` independent observations."""

    error: float

    def tails(self, bound: float) -> tuple[float, float]:
        if not self.error > 0:  # one unit, or units without any spread
            return math.nan, math.nan
        most = float(stats.t.sf((self.value - bound) / self.error, self.units - 1))
        return most, 1 - most

    def interval(self) -> tuple[float, float]:
        half = self.error * float(stats.t.ppf(1 - LEVEL / 2, self.units - 1)) if self.units > 1 else math.nan
        return self.value - half, self.value + half

    def detectable(self) -> float:
        if self.units < 2:
            return math.nan
        return self.error * float(stats.t.ppf([1 - LEVEL / 2, POWER], self.units - 1).sum())


@dataclass(frozen=True)
class OverDraws(Difference):
    """A bootstrap's draws of the mean difference."""

    draws: numpy.ndarray

    def tails(self, bound: float) -> tuple[float, float]:
        if not self.draws.std() > 0:
            return math.nan, math.nan
        most, least = (1 + int((self.draws <= bound).sum())), (1 + int((self.draws >= bound).sum()))
        return most / (1 + len(self.draws)), least / (1 + len(self.draws))

    def interval(self) -> tuple[float, float]:
        low, high = numpy.quantile(self.draws, [LEVEL / 2, 1 - LEVEL / 2])
        return float(low), float(high)

    def detectable(self) -> float:
        return float(self.draws.std(ddof=1) * stats.norm.ppf([1 - LEVEL / 2, POWER]).sum())


def paired(a: Sequence[dict], b: Sequence[dict], of: Callable[[dict], float], runs: bool = False) -> OverUnits:
    """The difference a − b over bases, each the mean over its seeds.

    a, b: records of two arms; pairs are matched by base and seed, those without a partner left out. runs: every run as
    a unit of its own.
    """
    found = [((x["base"], x["seed"]), of(x) - of(y)) for x, y in _matched(a, b)]
    units = [d for _, d in found]
    if not runs:
        units = [mean([d for (base, _), d in found if base == one]).value for one in sorted({k[0] for k, _ in found})]
    whole = mean(units)
    return OverUnits(whole.value, whole.n, len(found), whole.error)


def over_seeds_and_prompts(a: Sequence[dict], b: Sequence[dict], of_each: Callable[[dict], list[float]]) -> OverDraws:
    """The difference a − b by a two-way bootstrap: seeds and prompts drawn with replacement, the same for both arms.

    of_each: a record's number for each prompt, the same prompts in every record. Raises ValueError without two seeds.
    """
    pairs = _matched(a, b)
    if len(pairs) < 2:
        raise ValueError(f"a bootstrap must have two seeds at least, got {len(pairs)}.")
    found_SP = numpy.array([numpy.subtract(of_each(x), of_each(y)) for x, y in pairs], float)
    seeds, prompts = found_SP.shape
    drawn = numpy.random.default_rng(0).integers
    draws = [found_SP[drawn(seeds, size=seeds)][:, drawn(prompts, size=prompts)].mean() for _ in range(DRAWS)]
    return OverDraws(float(found_SP.mean()), seeds, len(pairs), numpy.array(draws))


def _matched(a: Sequence[dict], b: Sequence[dict]) -> list[tuple[dict, dict]]:
    others = {(r["base"], r["seed"]): r for r in b}
    return [(r, others[r["base"], r["seed"]]) for r in a if (r["base"], r["seed"]) in others]


def p_value(found: Difference, expect: str, margin: float) -> float:
    """Of the hypothesis that an expectation puts to the test, so that at most 5 % decides it.

    more, less: two-sided against 0. not-inferior: two-sided against −margin. equal: two one-sided tests (TOST).
    """
    if expect == "equal":
        return max(found.tails(-margin)[0], found.tails(margin)[1])
    p = 2 * min(found.tails(-margin if expect == "not-inferior" else 0.0))
    return p if math.isnan(p) else min(p, 1.0)


def verdict(found: Difference, expect: str, margin: float, p: float) -> str:
    """p: corrected for the other comparisons of the table."""
    if math.isnan(p):
        return NOT_TESTABLE
    if p >= LEVEL:
        return NOT_SHOWN
    if expect == "equal":
        return HELD
    side = -found.value if expect == "less" else found.value + margin
    return HELD if side > 0 else OPPOSITE


def holm(values: Collection[float]) -> list[float]:
    """p values corrected for each other by Holm's step-down; NaNs are no tests and stay.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    tested = sorted((p, i) for i, p in enumerate(values) if not math.isnan(p))
    corrected, highest = list(values), 0.0
    for rank, (p, i) in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - rank) * p))
        corrected[i] = highest
    return corrected
