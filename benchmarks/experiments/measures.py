"""The quantities of the report: one number a run each."""

from __future__ import annotations

import math
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


def _metric(name: str) -> Callable[[dict], float]:
    return lambda record: record["metrics"][name]


def _pass_at(k: int) -> Callable[[dict], float]:
    return lambda record: record["metrics"]["pass_at"].get(str(k), math.nan)


def _gradient(number: Callable[[list[float]], float]) -> Callable[[dict], float]:
    return lambda record: number(record["training"]["grad_norm"]) if "training" in record else math.nan


def _window_mean(name: str) -> Callable[[dict], float]:
    """The mean over training of what the trainer logs under a name."""

    def of(record):
        values = record.get("training", {}).get("windows", {}).get(name)
        return sum(values) / len(values) if values else math.nan

    return of


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


MEASURES = {
    "pass1": Measure("pass@1", _pass_at(1)),
    "pass16": Measure("pass@16", _pass_at(16)),
    "distinct": Measure("distinct@16", _metric("distinct"), 2),
    "entropy": Measure("entropy", _metric("entropy")),
    "kl": Measure("KL to base", _metric("kl")),
    "retention": Measure("retention", _metric("retention")),
    "expert": Measure("expert, nats per token", _metric("expert_log_likelihood"), 2),
    "grad_median": Measure("gradient norm, median", _gradient(_median), 2),
    "grad_max": Measure("gradient norm, max", _gradient(max), 2),
    "zero_std": Measure("zero-std groups", _window_mean("zero_std_groups"), 2),
    "rectified": Measure("rectified", _window_mean("rectified"), 2),
}
