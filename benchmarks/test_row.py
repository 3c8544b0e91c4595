"""pytest-benchmark entry points of the row loss: `pytest benchmarks --benchmark-only`.

The committed figures come from `python -m benchmarks.bench_row`, where contenders take turns under the headline
allocator; these are for a quick look and for pytest-benchmark's own --benchmark-compare.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import provenance
from benchmarks.harness import Absent, check
from benchmarks.peers import row_contender, row_contenders
from benchmarks.row_problem import RowProblem, build_row_problem
from benchmarks.shapes import RowCase

CASES = (
    RowCase(16, 32000),
    RowCase(16, 151936),
    RowCase(16, 151936, "bfloat16"),
    RowCase(16, 151936, dead="zero-advantage"),
)
NAMES = tuple(entry.name for entry in row_contenders(build_row_problem(RowCase(8, 64))))


@pytest.fixture(scope="module", params=CASES, ids=RowCase.label)
def problem(request) -> RowProblem:
    torch.set_num_threads(request.param.threads)
    return build_row_problem(request.param)


@pytest.mark.parametrize("name", NAMES)
def test_row(benchmark, problem: RowProblem, name: str):
    contender = row_contender(problem, name)
    if isinstance(contender, Absent):
        pytest.skip(contender.why)
    outcome = check(problem, contender)
    if outcome.status == "absent":
        pytest.skip(outcome.why)
    assert outcome.status == "ready", outcome.why
    benchmark.extra_info.update(allocator=provenance.allocator(), error=outcome.error)
    benchmark.pedantic(contender.step, setup=lambda: problem.prepare(problem.timed_upstream), rounds=5, warmup_rounds=1)
