"""The claims that are put to the test: a file in `claims`, which for a registered study is committed first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.experiments.measures import MEASURES
from benchmarks.experiments.methods import METHODS, stages

FOLDER = Path(__file__).parent / "claims"
EXPLORATORY = "exploratory"
EXPECTATIONS = {"more": "more", "less": "less", "not-inferior": "not less by {:g}", "equal": "equal within {:g}"}
"""What may be expected, and how it is said of a margin."""


@dataclass(frozen=True)
class Comparison:
    """What is expected of the mean difference of a measure between `better` and `other`.

    more, less: on that side of 0. not-inferior: above −margin. equal: within ±margin.
    """

    better: str
    other: str
    measure: str
    expect: str
    margin: float = 0.0


@dataclass(frozen=True)
class Claim:
    """origin: "paper" for what the method's authors say or imply, "control" for a question of this project's own."""

    text: str
    origin: str
    comparisons: tuple[Comparison, ...]
    why_not: str = ""


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.yaml"


def read(name: str) -> list[dict]:
    """The entries of claims/NAME.yaml. Raises FileNotFoundError, ValueError for an entry that cannot be tested."""
    entries = yaml.safe_load(path_of(name).read_text(encoding="utf-8"))
    claims_of(entries)
    return entries


def claims_of(entries: list[dict]) -> list[Claim]:
    return [_claim(**entry) for entry in entries]


def _claim(claim, origin, pairs=(), why_not="", measure="", expect="", margin=0.0) -> Claim:
    if pairs and (measure not in MEASURES or expect not in EXPECTATIONS):
        raise ValueError(f"{claim!r} must have a known measure and expectation, got {measure!r} and {expect!r}.")
    if pairs and (margin > 0) != (expect in ("not-inferior", "equal")):
        raise ValueError(f"{claim!r} must have a margin where it is about one and nowhere else, got {margin:g}.")
    unknown = [stage for pair in pairs for chain in pair for stage in stages(chain) if stage not in METHODS]
    if unknown:
        raise ValueError(f"{claim!r} must compare known methods, got {unknown[0]!r}.")
    return Claim(claim, origin, tuple(Comparison(*pair, measure, expect, margin) for pair in pairs), why_not)
