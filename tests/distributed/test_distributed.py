"""Logits and heads sharded over the vocabulary, on four gloo processes; the checks are in vocabulary_ranks.py."""

from __future__ import annotations

import contextlib

import pytest
import torch
import vocabulary_ranks as ranks
from ranks import start_ranks

from gft_kernels import backends, distributed
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
    reason = backends.named(backend).absent()
    if reason is not None:
        pytest.skip(f"backend {backend}: {reason}")
    for rank in ranks.members(size, backend, check):
        result = said[rank].get(
            ranks.name_of(size, backend, check), "not reached: a check before this one failed on some rank"
        )
        assert not result, f"rank {rank}: {result}"


def test_a_target_that_no_rank_holds_spoils_its_row_only(monkeypatch):
    """A group of one; what several make of their parts, the ranks' checks see."""
    z, target = torch.randn(6, 23, dtype=torch.float64) * 4, torch.tensor([2, 20, 9, 22, 0, 23])
    monkeypatch.setattr(distributed, "group_of", lambda name: None)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, op, group: x)
    found = (target < 23).double()
    others = z.masked_fill(torch.arange(23) == target[:, None], -float("inf"))
    fall = torch.where(others == -float("inf"), 0.0, others - others.amax(1, keepdim=True))
    share = torch.exp(others - others.amax(1, keepdim=True))
    logit = z.gather(1, target.clamp(max=22)[:, None])[:, 0] * found
    row = distributed.merge_shards("", others.amax(1), share.sum(1), (share * fall).sum(1), logit, found)
    log_pi = torch.log_softmax(z, 1)[:5]
    torch.testing.assert_close(row.log_pi_R[:5], log_pi.gather(1, target[:5, None])[:, 0])
    torch.testing.assert_close(row.entropy_R[:5], -(log_pi.exp() * log_pi).sum(1))
    assert row.log_pi_R.isnan().tolist() == [False] * 5 + [True]


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
