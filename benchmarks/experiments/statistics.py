"""Means with standard errors, and paired differences with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# 97.5 % quantiles of Student's t by degrees of freedom.
# Source: NIST/SEMATECH e-Handbook of Statistical Methods, section 1.3.6.7.2.
T_975 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
         2.131, 2.120, 2.110, 2.101, 2.093, 2.086)  # fmt: skip


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
    value = sum(values) / n
    if n == 1:
        return Mean(value, math.nan, 1)
    return Mean(value, math.sqrt(sum((x - value) ** 2 for x in values) / (n - 1) / n), n)


@dataclass(frozen=True)
class Difference:
    """The mean of a − b over the pairs that share base and seed, with the 95 % interval of Student's t.

    bases, agreeing: how many bases there are, and on how many of them the mean difference has the sign of the whole.
    """

    value: float
    low: float
    high: float
    n: int
    bases: int
    agreeing: int


def paired(a: Sequence[dict], b: Sequence[dict], of: Callable[[dict], float]) -> Difference:
    """a, b: records of two arms; pairs are matched by base and seed, those without a partner left out."""
    others = {(r["base"], r["seed"]): of(r) for r in b}
    pairs = [(r["base"], of(r) - others[r["base"], r["seed"]]) for r in a if (r["base"], r["seed"]) in others]
    whole = mean([d for _, d in pairs])
    by_base = [mean([d for base, d in pairs if base == number]).value for number in sorted({base for base, _ in pairs})]
    agreeing = sum(d * whole.value > 0 for d in by_base)
    half = T_975[whole.n - 1] * whole.error if 1 < whole.n <= len(T_975) else math.nan
    return Difference(whole.value, whole.value - half, whole.value + half, whole.n, len(by_base), agreeing)
