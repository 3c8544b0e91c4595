"""A row cut into shards of its vocabulary, for any backend: what each says of itself, and its part of the gradient."""

from __future__ import annotations

from itertools import pairwise

import torch

from gft_kernels.options import AgreedRows, Credit, Objective, RowCall

CUTS = (0, 1, 8, 507, 510)
TRANSFORMS = ({}, {"softcap": 30.0, "temperature": 0.7}, {"logit_scale": -0.5})


def assert_shards_are_parts_of_the_row(
    backend, dtype=torch.float32, entropy_coef=0.4, inplace=False, gradient_dtype=None, **transform
) -> None:
    """Against float64. Row 2 is not read, row 3's target is banned, and of row 4 all but one shard is."""
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(1, 5, 510, generator=generator) * 3 + 40).to(dtype)
    targets, read = torch.tensor([0, 200, 9, 40, 6]), torch.tensor([True, True, False, True, True])
    ban = float("-inf") if transform.get("logit_scale", 1.0) > 0 else float("inf")
    logits[0, 3, 40] = logits[0, 4, 8:] = ban
    z = logits[0].double() * transform.get("logit_scale", 1.0)
    slope = torch.full_like(z, transform.get("logit_scale", 1.0) / transform.get("temperature", 1.0))
    if "softcap" in transform:
        slope, z = slope * (1 - torch.tanh(z / 30.0) ** 2), 30.0 * torch.tanh(z / 30.0)
    z = z / transform.get("temperature", 1.0)
    objective, options = Objective(entropy_coef=entropy_coef), {**transform, "inplace": inplace, "want_entropy": True}
    shards = [
        (start, RowCall(logits[..., start:end], Credit(targets), objective, gradient_dtype=gradient_dtype, **options))
        for start, end in pairwise(CUTS)
    ]
    others = z.scatter(1, targets[:, None], float("-inf"))
    for start, call in shards:
        assert_statistics(backend.shard_statistics(call, targets - start, read), z, others, targets, start, call, read)

    log_pi = torch.log_softmax(z, 1)
    tilted = torch.where(log_pi == float("-inf"), 0.0, log_pi.exp() * log_pi)  # pi·log pi
    entropy, scale = -tilted.sum(1), torch.tensor([0.5, -2.0, 0.0, 1.5, 1e-3])
    tilt = torch.where(read, entropy_coef, 0.0)
    log_mass = torch.logsumexp(z, 1) - z.amax(1)
    row = (log_pi[range(5), targets], z.amax(1), log_mass, scale, tilt, entropy)
    agreed = AgreedRows(*(x.float() for x in row))
    parts = [backend.shard_gradient(call, targets - start, agreed) for start, call in shards]
    assert (parts[1].data_ptr() == logits[..., CUTS[1] :].data_ptr()) == inplace
    gradient = torch.cat(parts, -1)[0]
    truth = scale[:, None] * (log_pi.exp() - torch.nn.functional.one_hot(targets, 510))
    truth = (truth + tilt[:, None] * (tilted + log_pi.exp() * entropy[:, None])) * slope
    rounding = torch.finfo(gradient.dtype).eps if gradient.dtype != torch.float32 else 0.0
    assert gradient.dtype == (gradient_dtype or dtype) and gradient[2].eq(0).all()
    torch.testing.assert_close(gradient[read].double(), truth[read], rtol=1e-4 + rounding, atol=1e-6)


def assert_statistics(found, z, others, targets, start, call, read) -> None:
    """The state of a shard's columns without the target, the gap of its entropy, and the target's logit."""
    top, mass, gap, target_logit = (x.double() for x in found)
    part = others[:, start : start + call.logits_STV.shape[-1]]
    torch.testing.assert_close((top + mass.log())[read], torch.logsumexp(part, 1)[read], rtol=1e-6, atol=1e-6)
    share = torch.softmax(part, 1).nan_to_num()  # of nothing, where all is banned
    expected = torch.where(share > 0, share * (part - top[:, None]), 0.0).sum(1)
    torch.testing.assert_close((gap / mass).nan_to_num()[read], expected[read], rtol=1e-5, atol=1e-5)
    mine = (targets >= start) & (targets < start + part.shape[1])
    truth = torch.where(mine, z[range(5), targets], 0.0)
    torch.testing.assert_close(target_logit[read], truth[read], rtol=1e-6, atol=0.0)
    assert top[2] == float("-inf") and mass[2] == target_logit[2] == 0
