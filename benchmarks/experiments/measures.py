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


def _gradient(number: int) -> Callable[[dict], float]:
    """One of the quantiles of the gradient norm (training.QUANTILES)."""
    return lambda record: record["training"]["grad_norm"][number] if "training" in record else math.nan


def _mean_of(name: str) -> Callable[[dict], float]:
    """The mean over training of what the trainer logs under a name."""
    return lambda record: record.get("training", {}).get("means", {}).get(name, math.nan)


def _spike(record: dict) -> float:
    """NaN where half of the steps had nothing to learn from: all groups were right, or all wrong."""
    median = _gradient(5)(record)
    return _gradient(10)(record) / median if median > 1e-6 else math.nan


def _thousands(name: str) -> Callable[[dict], float]:
    """Response tokens of the last stage."""
    return lambda record: record.get("training", {}).get("tokens", {}).get(name, math.nan) / 1000


MEASURES = {
    "pass1": Measure("pass@1", _pass_at(1)),
    "pass16": Measure("pass@16", _pass_at(16)),
    "distinct": Measure("distinct right", _metric("distinct"), 2),
    "entropy": Measure("entropy", _metric("entropy")),
    "kl": Measure("KL to base", _metric("kl")),
    "retention": Measure("retention", _metric("retention")),
    "expert": Measure("expert, nats per token", _metric("expert_log_likelihood"), 2),
    "grad_median": Measure("gradient norm, median", _gradient(5), 2),
    "grad_max": Measure("gradient norm, max", _gradient(10), 2),
    "spike": Measure("largest over median", _spike, 1),
    "generated": Measure("generated, 1000 tokens", _thousands("generated"), 1),
    "trained": Measure("trained, 1000 tokens", _thousands("trained"), 1),
    "zero_std": Measure("zero-std groups", _mean_of("zero_std_groups"), 2),
    "seconds": Measure("processor s, with evaluation", lambda record: record.get("cpu_seconds", math.nan), 0),
    "rectified": Measure("rectified", _mean_of("rectified"), 2),
}
