"""pytest-benchmark entry points: `pytest benchmarks --benchmark-only`.

The committed figures come from `python -m benchmarks.bench_row` and `bench_linear`, where contenders take turns under
the headline allocator; these are for a quick look and for pytest-benchmark's own --benchmark-compare.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import provenance
from benchmarks.harness import Absent, check
from benchmarks.kinds import KINDS
from benchmarks.shapes import LinearCase, RowCase

CASES = (
    RowCase(16, 32000),
    RowCase(16, 151936),
    RowCase(16, 151936, "bfloat16"),
    RowCase(16, 151936, dead="zero-advantage"),
    LinearCase(64, 128, 32000),
    LinearCase(64, 128, 32000, dead="zero-advantage"),
)
SMALLEST = {"row": RowCase(8, 64), "linear": LinearCase(8, 16, 64)}


def kind_of(case) -> str:
    return "row" if isinstance(case, RowCase) else "linear"


def names(kind: str) -> list[str]:
    return [entry.name for entry in KINDS[kind].contenders(KINDS[kind].build(SMALLEST[kind]), "")]


NAMES = {kind: names(kind) for kind in KINDS}
STEPS = [
    pytest.param(case, name, id=f"{case.label()}: {name}".replace("×", "x"))
    for case in CASES
    for name in NAMES[kind_of(case)]
]


@pytest.fixture(scope="module")
def problems() -> dict:
    """The problem of the case at hand; the one before it is dropped."""
    return {}


@pytest.mark.parametrize(("case", "name"), STEPS)
def test_step(benchmark, problems: dict, case, name: str):
    kind = KINDS[kind_of(case)]
    torch.set_num_threads(case.threads)
    if case not in problems:
        problems.clear()
        problems[case] = kind.build(case)
    problem = problems[case]
    contender = kind.contender(problem, name)
    if isinstance(contender, Absent):
        pytest.skip(contender.why)
    outcome = check(problem, contender)
    if outcome.status == "absent":
        pytest.skip(outcome.why)
    assert outcome.status == "ready", outcome.why
    benchmark.extra_info.update(allocator=provenance.allocator(), error=outcome.error)
    benchmark.pedantic(contender.step, setup=lambda: problem.prepare(problem.timed_upstream), rounds=5, warmup_rounds=1)
