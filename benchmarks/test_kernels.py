"""The same kinds under pytest-benchmark: `pytest benchmarks --benchmark-only`.

Their quick cases, for a quick look and for pytest-benchmark's own --benchmark-compare; the committed figures come from
`python -m benchmarks`, where contenders take turns under the headline allocator. Shards need several processes: only
that command has them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from benchmarks import provenance
from benchmarks.harness import check
from benchmarks.kinds import KINDS

STEPS = [
    pytest.param(name, case, peer, id=f"{case.label()}: {peer}".replace("×", "x"))
    for name, kind in KINDS.items() if not kind.measure
    for case in (replace(case, threads=1) for case in kind.cases("cpu", quick=True))
    for peer in kind.peers if "auto" not in peer
]  # fmt: skip


@lru_cache(1)
def problem_of(name: str, case):
    """The problem of the case at hand; the one before it is dropped."""
    return KINDS[name].build(case)


@pytest.mark.parametrize(("name", "case", "peer"), STEPS)
def test_step(benchmark, name: str, case, peer: str):
    pytest.importorskip("transformers" if name in ("step", "prompts") else "torch")
    torch.set_num_threads(case.threads)
    problem = problem_of(name, case)
    contender = KINDS[name].contender(problem, peer)
    outcome = check(problem, contender)
    if outcome.status == "absent":
        pytest.skip(outcome.why)
    assert outcome.status == "ready", outcome.why
    benchmark.extra_info.update(allocator=provenance.allocator(), error=outcome.error)
    benchmark.pedantic(contender.step, setup=lambda: problem.prepare(case.upstream), rounds=5, warmup_rounds=1)
