"""The quantities of the report: one number a run each."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """title: the head of its column. of: the number of a record, NaN where the run has none."""

    title: str
    of: Callable[[dict], float]
    digits: int = 3

    def show(self, value: float) -> str:
        return "–" if math.isnan(value) else f"{value:.{self.digits}f}"


def _at(*path: str | int, unit: float = 1) -> Callable[[dict], float]:
    """What stands at a path of a record, in units of `unit`."""

    def of(record: dict) -> float:
        try:
            return functools.reduce(operator.getitem, path, record) / unit
        except KeyError:
            return math.nan

    return of


MEDIAN, LARGEST = _at("training", "grad_norm", 5), _at("training", "grad_norm", 10)  # of training.QUANTILES


def _spike(record: dict) -> float:
    """NaN where half of the steps had nothing to learn from: all groups were right, or all wrong."""
    return LARGEST(record) / MEDIAN(record) if MEDIAN(record) > 1e-6 else math.nan


MEASURES = {
    "pass1": Measure("pass@1", _at("metrics", "pass_at", "1")),
    "pass16": Measure("pass@16", _at("metrics", "pass_at", "16")),
    "distinct": Measure("distinct right", _at("metrics", "distinct"), 2),
    "entropy": Measure("entropy", _at("metrics", "entropy")),
    "kl": Measure("KL to base", _at("metrics", "kl")),
    "retention": Measure("retention", _at("metrics", "retention")),
    "expert": Measure("expert, nats per token", _at("metrics", "expert_log_likelihood"), 2),
    "grad_median": Measure("gradient norm, median", MEDIAN, 2),
    "grad_max": Measure("gradient norm, max", LARGEST, 2),
    "spike": Measure("largest over median", _spike, 1),
    "generated": Measure("generated, 1000 tokens", _at("training", "tokens", "generated", unit=1000), 1),
    "trained": Measure("trained, 1000 tokens", _at("training", "tokens", "trained", unit=1000), 1),
    "zero_std": Measure("zero-std groups", _at("training", "means", "zero_std_groups"), 2),
    "seconds": Measure("processor s, with evaluation", _at("cpu_seconds"), 0),
    "rectified": Measure("rectified", _at("training", "means", "rectified"), 2),
}
"""Tokens are those of the responses of the last stage; means are over training, of what the trainer logs."""
