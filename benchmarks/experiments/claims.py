"""The claims that are put to the test, each as paired comparisons of two arms, and what the comparisons say."""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.experiments.measures import MEASURES
from benchmarks.experiments.results import Results
from benchmarks.experiments.statistics import Difference, paired

HELD, OPPOSITE, NOT_SHOWN, NOT_TESTABLE = "held", "did not hold: the opposite", "not shown", "not testable here"


@dataclass(frozen=True)
class Comparison:
    """`better` is claimed to exceed `other` in a measure (sign +1) or to stay below it (sign −1)."""

    better: str
    other: str
    measure: str
    sign: int = 1


@dataclass(frozen=True)
class Claim:
    """origin: "paper" for what the method's authors say or imply, "control" for a question of this study's own."""

    text: str
    origin: str
    comparisons: tuple[Comparison, ...] = ()
    why_not: str = ""


def _more(better: str, *others: str, measure: str = "pass1") -> tuple[Comparison, ...]:
    return tuple(Comparison(better, other, measure) for other in others)


def _less(better: str, *others: str, measure: str) -> tuple[Comparison, ...]:
    return tuple(Comparison(better, other, measure, -1) for other in others)


CLAIMS = (
    Claim("GFT solves more than SFT", "paper", _more("gft", "sft", "sft-same")),
    Claim("GFT solves more than SFT on the same demonstrations", "control", _more("gft", "sft-mix")),
    Claim("GFT solves more than SFT with ten times the data", "paper", _more("gft", "sft-10x")),
    Claim("GFT solves more than DFT", "paper", _more("gft", "dft")),
    Claim("GFT solves more than GRPO in as many steps", "paper", _more("gft", "grpo")),
    Claim("GFT keeps more ways to solve a problem than SFT", "paper",
          _more("gft", "sft", "sft-same", measure="distinct")),
    Claim("GFT keeps more ways to solve a problem than GRPO", "control", _more("gft", "grpo", measure="distinct")),
    Claim("GFT stays nearer to the base model than SFT", "paper", _less("gft", "sft", "sft-same", measure="kl")),
    Claim("GFT forgets less than SFT", "paper", _more("gft", "sft", "sft-same", measure="retention")),
    Claim("SFT's gradient spikes, GFT's does not", "paper", _less("gft", "sft", "sft-same", measure="grad_max")),
    Claim("the coefficient C is what keeps the gradient small", "paper", _less("gft", "gft-tau-0", measure="grad_max")),
    Claim("the coefficient C raises accuracy", "paper", _more("gft", "gft-tau-0")),
    Claim("C between the extremes beats C = π everywhere", "paper", _more("gft", "gft-tau-1")),
    Claim("C is better left to A > 0", "control", _more("gft-positive", "gft")),
    Claim("teachers in the group help", "paper", _more("gft", "gft-no-mix")),
    Claim("demonstrations in the group help", "paper", _more("gft", "gft-0-8")),
    Claim("samples of the policy in the group help", "control", _more("gft", "gft-8-0")),
    Claim("division by the group's std helps", "control", _more("gft", "gft-mean", "gft-leave-one-out")),
    Claim("SFT damages what GRPO reaches afterwards", "paper", _less("sft>grpo", "grpo>grpo", measure="pass1")
          + _less("sft-same>grpo", "grpo>grpo", measure="pass1")),
    Claim("GFT prepares GRPO better than SFT does", "paper", _more("gft>grpo", "sft>grpo", "sft-same>grpo")),
    Claim("GFT prepares GRPO better than GRPO itself, steps matched", "paper", _more("gft>grpo", "grpo>grpo")),
    Claim("GFT after SFT repairs what SFT broke", "paper", _more("sft-same>gft", "sft-same") + _more("sft>gft", "sft")),
    Claim("SFT → GFT → GRPO solves more than SFT → GRPO", "paper", _more("sft-same>gft>grpo", "sft-same>grpo")),
    Claim("the group advantage is an unbiased policy gradient", "paper",
          why_not="a statement about expectations, not about runs: decided exactly in [the mathematics](formulas.md)"),
    Claim("the gains carry over to language models of billions of parameters and to competition mathematics", "paper",
          why_not="needs the checkpoints and several GPUs: `examples/numina_qwen2.5_math_1.5b.yaml` is the run"),
)  # fmt: skip


def difference(results: Results, comparison: Comparison, expert: str) -> Difference:
    of = MEASURES[comparison.measure].of
    return paired(results.of(comparison.better, expert), results.of(comparison.other, expert), of)


def verdict(found: Difference, sign: int) -> str:
    """By the side of 0 on which the 95 % interval lies, if it lies on one. Without two pairs nothing can be said."""
    if math.isnan(found.low):
        return NOT_TESTABLE
    low, high = sorted((sign * found.low, sign * found.high))
    return HELD if low > 0 else OPPOSITE if high < 0 else NOT_SHOWN
