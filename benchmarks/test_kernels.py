"""pytest-benchmark entry points: `pytest benchmarks --benchmark-only`.

The committed figures come from `gft bench`, where contenders take turns under the headline allocator; these are for a
quick look and for pytest-benchmark's own --benchmark-compare. Shards need several processes: gft bench has them.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks import provenance
from benchmarks.harness import Absent, check
from benchmarks.kinds import KINDS
from benchmarks.shapes import AdvantageCase, LinearCase, LogProbCase, RowCase, StepCase

CASES = {
    "row": (RowCase(16, 32000), RowCase(16, 151936), RowCase(16, 151936, "bfloat16"),
            RowCase(16, 151936, dead="zero-advantage")),
    "linear": (LinearCase(64, 128, 32000), LinearCase(64, 128, 32000, dead="zero-advantage")),
    "log-probs": (LogProbCase(64, 128, 32000),),
    "advantages": (AdvantageCase(64, 8), AdvantageCase(64, 8, "ids")),
    "step": (StepCase(16, vocab=32000, hidden=64, threads=1),),
}  # fmt: skip
SMALLEST = {
    "row": RowCase(8, 64),
    "linear": LinearCase(8, 16, 64),
    "log-probs": LogProbCase(8, 16, 64),
    "advantages": AdvantageCase(8, 4),
    "step": StepCase(2, vocab=64, hidden=16, layers=1, heads=2, threads=1),
}


def names(kind: str) -> list[str]:
    """Everyone who could be asked, in a case that takes no time to make; [] where its inputs cannot be made."""
    try:
        problem = KINDS[kind].build(SMALLEST[kind])
    except ModuleNotFoundError:
        return []
    return [entry.name for entry in KINDS[kind].invite(problem)]


STEPS = [
    pytest.param(kind, case, name, id=f"{case.label()}: {name}".replace("×", "x"))
    for kind, cases in CASES.items()
    for case, name in itertools.product(cases, names(kind))
]


@pytest.fixture(scope="module")
def problems() -> dict:
    """The problem of the case at hand; the one before it is dropped."""
    return {}


@pytest.mark.parametrize(("kind", "case", "name"), STEPS)
def test_step(benchmark, problems: dict, kind: str, case, name: str):
    kind = KINDS[kind]
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
