"""The sharded kernels: three shards of different width, merged by the formulas, give what the whole row gives."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from gft_kernels import formulas
from gft_kernels.backends import triton as backend
from gft_kernels.options import AgreedRows, Credit, Objective, RowCall


@pytest.mark.parametrize(("softcap", "entropy_coef"), [(0.0, 0.0), (0.0, 0.4), (9.0, 0.4)])
def test_shards_make_the_row(softcap, entropy_coef):
    """The second rank's shard is an unaligned slice, the third's is all banned in one row."""
    torch.manual_seed(3)
    logits = torch.randn(1, 5, 601) * 3
    if not softcap:
        logits[0, 2, 300:] = -float("inf")
    targets = torch.tensor([0, 290, 299, -100, 600])
    credit = Credit(
        targets,
        advantages_R=torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0]),
        weights_R=torch.ones(5),
        tokens_per_response=5,
        reduction="sum",
    )
    call = RowCall(
        logits, credit, Objective(entropy_coef=entropy_coef), softcap=softcap, temperature=0.8, want_gradient=True,
        want_stats=True, want_entropy=True,
    )  # fmt: skip
    whole = backend.run(call)

    bounds = [0, 291, 300, 601]
    shards = [(replace(call, logits_STV=logits[..., a:b]), targets - a) for a, b in pairwise(bounds)]
    read = torch.tensor([True, True, True, False, True])
    parts = [backend.shard_statistics(shard, columns, read) for shard, columns in shards]
    assert all(p.top_R[3] == -float("inf") and p.mass_R[3] == 0 and p.target_logit_R[3] == 0 for p in parts)
    top, mass, gap = (torch.full((5,), -float("inf")), torch.zeros(5), torch.zeros(5))
    for p in parts:
        new_top, mass_after = formulas.merge(top, mass, p.top_R, p.mass_R)
        anchor = torch.where(new_top == -float("inf"), 0.0, new_top)
        gap = formulas.raise_gap(gap, mass, top - anchor) + formulas.raise_gap(p.gap_R, p.mass_R, p.top_R - anchor)
        top, mass = new_top, mass_after
    z_y = sum(p.target_logit_R for p in parts)
    log_pi = formulas.log_prob(z_y, top, mass)
    top_all, mass_all = formulas.observe(top, mass, z_y)
    gap = formulas.raise_gap(gap, mass, top - top_all) + formulas.raise_gap(0.0, 1.0, z_y - top_all)
    torch.testing.assert_close(log_pi[read], whole.log_probs_R[read], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        formulas.entropy(mass_all.log(), gap / mass_all)[read], whole.entropy_R[read], rtol=1e-5, atol=1e-6
    )

    scale, tilt = torch.where(read, credit.advantages_R * whole.coefficients_R, 0.0), read * entropy_coef
    numbers = (torch.where(read, x, 0.0) for x in (log_pi, top_all, mass_all.log()))
    agreed = AgreedRows(*numbers, scale, tilt, whole.entropy_R)
    pieces = [backend.shard_gradient(shard, columns, agreed) for shard, columns in shards]
    torch.testing.assert_close(torch.cat(pieces, -1), whole.gradient_STV, rtol=1e-5, atol=1e-8)
    assert torch.cat(pieces, -1)[0, 3].eq(0).all()
    over = [
        backend.shard_gradient(
            replace(shard, logits_STV=shard.logits_STV.clone(), inplace=True, gradient_dtype=torch.float16), y, agreed
        )
        for shard, y in shards
    ]
    assert torch.equal(torch.cat(over, -1), torch.cat(pieces, -1).half())
