"""Logits and heads sharded over the vocabulary, on four gloo processes; the checks are in vocabulary_ranks.py."""

from __future__ import annotations

import contextlib

import pytest
import torch
import vocabulary_ranks as ranks
from ranks import start_ranks

from gft_kernels import distributed, formulas, registry
from gft_kernels.advantages import credit_rows
from gft_kernels.linear import chunks
from gft_kernels.options import Credit, LinearCall

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What each rank says of each check, from one launch of all of them (starting processes is what costs)."""
    folder = tmp_path_factory.mktemp("ranks")
    with contextlib.suppress(
        torch.multiprocessing.ProcessExitedException, torch.multiprocessing.ProcessRaisedException
    ):
        start_ranks(ranks.work, folder, 4)
    return [torch.load(path) if (path := folder / f"said{rank}.pt").exists() else {} for rank in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "backend", "check"), ranks.COMBINATIONS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_sharded_vocabulary(said, size, backend, check):
    reason = registry.backend(backend).absent()
    if reason is not None:
        pytest.skip(f"backend {backend}: {reason}")
    for rank in ranks.members(size, backend, check):
        result = said[rank].get(
            ranks.name_of(size, backend, check), "not reached: a check before this one failed on some rank"
        )
        assert not result, f"rank {rank}: {result}"


def test_merging_shards_is_the_softmax_of_the_whole(monkeypatch):
    """The algebra without processes: columns cut anywhere, sums over ranks done by hand."""
    z = torch.randn(6, 23, dtype=torch.float64) * 4
    z[1, :9] = -float("inf")
    target = torch.tensor([2, 20, 9, 22, 0, 23])  # the last is nobody's
    columns, cuts = torch.arange(23), [(0, 9), (9, 9), (9, 23)]
    states = []
    for start, stop in cuts:
        mine = (columns >= start) & (columns < stop)
        others = torch.where(mine & (columns != target[:, None]), z, -float("inf"))
        top = others.amax(1)
        anchor = torch.where(top == formulas.NEG_INF, 0.0, top)
        share = torch.exp(others - anchor[:, None])
        gap = torch.where(share == 0, 0.0, share * (others - anchor[:, None])).sum(1)
        found = ((target >= start) & (target < stop)).double()
        logit = z.gather(1, target.clamp(max=22)[:, None])[:, 0]
        states.append((top, share.sum(1), gap, logit * found, found))
    shared = torch.stack([s[0] for s in states]).amax(0)
    packed = []
    for collect in (True, False):
        for state in states:
            monkeypatch.setattr(distributed, "group_of", lambda name: None)
            monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, op, group: x.copy_(shared))

            def add(name, values, collect=collect):
                packed.append(values.clone()) if collect else values.copy_(torch.stack(packed).sum(0))

            monkeypatch.setattr(distributed, "sum_over_ranks", add)
            row = distributed.merge_shards("", *state)
            if not collect:
                log_pi = torch.log_softmax(z, 1)
                torch.testing.assert_close(row.log_pi_R[:5], log_pi[:5].gather(1, target[:5, None])[:, 0])
                assert row.log_pi_R[5].isnan()
                torch.testing.assert_close((row.top_R + row.log_mass_R)[:5], torch.logsumexp(z, 1)[:5])
                p = log_pi.exp()
                torch.testing.assert_close(row.entropy_R[:5], -torch.where(p > 0, p * log_pi, 0.0).sum(1)[:5])


def test_the_widest_shard_decides_the_chunks_of_all():
    """Ranks that cut different chunks would wait for each other for ever."""
    targets = torch.zeros(5000, dtype=torch.long)
    hidden, widths = torch.zeros(1, 5000, 2), torch.tensor([3, 40_000])
    credit = credit_rows(Credit(targets))
    chosen = [
        chunks.choose_rows(
            LinearCall(hidden, torch.zeros(width, 2), None, Credit(targets)), credit, distributed.Shard(widths, offset)
        )
        for width, offset in ((3, torch.tensor(0)), (40_000, torch.tensor(3)))
    ]
    assert chosen[0].chunk == chosen[1].chunk == chunks.chunk_rows(5000, 40_000, 4, "cpu") < 5000
