"""The reference backend: the loss and its gradient in plain torch, a block of rows at a time, on any device.

It is the readable definition of what a backend does, and what the others are compared with in daily use.
Sizes: C rows of a block, V vocabulary; S, T, R as in options.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from gft_kernels import formulas, surrogates
from gft_kernels.advantages import RowCredit, credit_rows, rows_read
from gft_kernels.options import (
    FP16_PEAK,
    SURROGATES,
    AgreedRows,
    Objective,
    RowCall,
    RowResult,
    ShardStatistics,
    gradient_for,
)

BLOCK_BYTES = 64 << 20
"""Float32 logits held at a time: large enough to hide the Python loop, small beside any logits worth a kernel."""


def absent() -> str | None:
    return None


def refuses(call: RowCall) -> str | None:
    return None


def _widened(call: RowCall, logits: Tensor) -> Tensor:
    """Logits in the dtype they are worked on in: float32, or float64 for a transform that float32 is too short for."""
    constants = (call.logit_scale, call.temperature, call.softcap or 1.0)
    short = all(1e-6 <= abs(x) <= 1e6 for x in constants) and call.softcap / call.temperature <= 1e4
    return logits.float() if short else logits.double()


class Block(NamedTuple):
    """Statistics of C rows, of shape (C,) except the transformed logits (C, V), in their dtype. Of the whole row."""

    z_CV: Tensor
    top_C: Tensor
    log_mass_C: Tensor
    log_pi_C: Tensor


def run(call: RowCall) -> RowResult:
    """Loss, statistics and, if wanted, the gradient of a call; see `RowResult`."""
    logits = call.logits_STV.detach()
    credit = credit_rows(call.credit)
    rows = credit.live_R.numel()
    per_row = partial(torch.zeros, rows, dtype=torch.float32, device=logits.device)
    out = {name: per_row() for name in ("loss", "log_prob", "coefficient", "entropy")}
    row_scale_R = per_row() if call.defer_scale else None
    gradient = gradient_for(logits, call.inplace, call.gradient_dtype) if call.want_gradient else None
    for chosen, where in _row_blocks(logits):
        part = RowCredit(*(column[chosen] for column in credit))
        logits_CV, targets_C = logits[where].flatten(0, 1), call.credit.targets_R[chosen]
        block = statistics(call, logits_CV, targets_C)
        read_C = rows_read(part, call.objective, call.reads_every_live_row)
        entropy_C = entropy(block) if call.needs_entropy else torch.zeros_like(block.log_pi_C)
        row = row_terms(call.objective.of_rows(chosen), block.log_pi_C, part.advantages_R, entropy_C)
        out["loss"][chosen] = torch.where(read_C, formulas.weighed(part.weights_R, row.loss), 0.0).float()
        out["log_prob"][chosen] = torch.where(read_C, block.log_pi_C, 0.0).float()
        out["coefficient"][chosen] = torch.where(read_C, row.coefficient, 0.0).float()
        out["entropy"][chosen] = torch.where(read_C, entropy_C, 0.0).float()
        if gradient is not None:
            scales, unit = row_scales(call, part.weights_R, row.kappa, entropy_C, read_C)
            if row_scale_R is not None:
                row_scale_R[chosen] = unit
            into = gradient[where]
            into.copy_(block_gradient(call, block, logits_CV, targets_C, scales).view(into.shape))
    loss = out["loss"] if call.credit.reduction == "none" else out["loss"].double().sum().float()
    return RowResult(
        loss=loss,
        log_probs_R=out["log_prob"],
        coefficients_R=out["coefficient"],
        advantages_R=credit.advantages_R,
        gradient_STV=gradient,
        row_scale_R=row_scale_R,
        entropy_R=out["entropy"] if call.want_entropy else None,
    )


def statistics(call: RowCall, logits_CV: Tensor, targets_C: Tensor) -> Block:
    """F1 to F3 over a block of rows. A target outside [0, V) gives a NaN log-probability."""
    z_CV, target_logit_C, inside_C, others_CV = _apart(call, logits_CV, targets_C)
    others_top_C, others_mass_C, _ = _state(others_CV)
    log_pi_C = formulas.log_prob(target_logit_C, others_top_C, others_mass_C).to(z_CV.dtype)
    top_C, mass_C = formulas.observe(others_top_C, others_mass_C, target_logit_C)
    return Block(z_CV, top_C, torch.log(mass_C).to(z_CV.dtype), torch.where(inside_C, log_pi_C, float("nan")))


def _apart(call: RowCall, logits_CV: Tensor, columns_C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Transformed logits, each row's target logit (0 if outside), whether it is inside, and the logits without it."""
    z_CV = formulas.transform(_widened(call, logits_CV), call.logit_scale, call.softcap, call.temperature)
    inside_C = _inside(columns_C, z_CV)
    at_C1 = columns_C.clamp(0, z_CV.shape[1] - 1)[:, None]
    found_C1 = z_CV.gather(1, at_C1)
    others_CV = z_CV.scatter(1, at_C1, torch.where(inside_C[:, None], formulas.NEG_INF, found_C1))
    return z_CV, torch.where(inside_C, found_C1[:, 0], 0.0), inside_C, others_CV


def _inside(columns_C: Tensor, z_CV: Tensor) -> Tensor:
    return (columns_C >= 0) & (columns_C < z_CV.shape[1])


def _state(z_CV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """F1 over whole rows: top, mass, and e^(z - top), whose sum the mass is.

    Float64 for the sum: where one token has nearly all of it, 1 + 1e-7 holds what entropy and its gradient are made of.
    """
    top_C = z_CV.amax(1)
    anchor_C = torch.where(top_C == formulas.NEG_INF, 0.0, top_C)
    share_CV = torch.exp(z_CV - anchor_C[:, None])
    return top_C, share_CV.sum(1, dtype=torch.float64), share_CV


def shard_statistics(call: RowCall, columns_R: Tensor, read_R: Tensor) -> ShardStatistics:
    """F1 over a vocabulary shard, in float64; see `ShardStatistics`."""
    out_4R = torch.zeros(4, columns_R.numel(), dtype=torch.float64, device=columns_R.device)
    out_4R[0] = formulas.NEG_INF
    for chosen, where in _row_blocks(call.logits_STV):
        _, target_logit_C, _, others_CV = _apart(call, call.logits_STV[where].flatten(0, 1), columns_R[chosen])
        top_C, mass_C, share_CV = _state(others_CV)
        gap_CV = torch.where(share_CV == 0.0, 0.0, share_CV * (others_CV - top_C[:, None]))
        for column, value in zip(out_4R[:, chosen], (top_C, mass_C, gap_CV.sum(1), target_logit_C), strict=True):
            column.copy_(torch.where(read_R[chosen], value.double(), column))
    return ShardStatistics(*out_4R)


def shard_gradient(call: RowCall, columns_R: Tensor, agreed: AgreedRows) -> Tensor:
    """F7 over a vocabulary shard, from what is known of the whole rows."""
    logits = call.logits_STV.detach()
    gradient = gradient_for(logits, call.inplace, call.gradient_dtype)
    for chosen, where in _row_blocks(logits):
        logits_CV, into = logits[where].flatten(0, 1), gradient[where]
        z_CV = formulas.transform(_widened(call, logits_CV), call.logit_scale, call.softcap, call.temperature)
        part = AgreedRows(*(x[chosen] for x in agreed))
        block = Block(z_CV, part.top_R, part.log_mass_R, part.log_pi_R)
        scales = RowScales(part.scale_R, part.tilt_R, part.entropy_R)
        into.copy_(block_gradient(call, block, logits_CV, columns_R[chosen], scales).view(into.shape))
    return gradient


def _row_blocks(logits_STV: Tensor) -> Iterator[tuple[slice, tuple[slice, slice]]]:
    """Consecutive rows a block at a time, flat and as places in S and T: some whole responses, or a part of one."""
    responses, tokens, vocabulary = logits_STV.shape
    rows = max(1, BLOCK_BYTES // (4 * max(vocabulary, 1)))
    for s in range(0, responses, tall := max(1, rows // max(tokens, 1))):
        for t in range(0, tokens, rows):
            first, end = s * tokens + t, min(s + tall, responses) * tokens
            yield slice(first, min(first + tall * rows, end)), (slice(s, s + tall), slice(t, t + rows))


class RowTerms(NamedTuple):
    """What an objective makes of each row; float64 of the shape of log pi, for e^100 is a kappa too."""

    coefficient: Tensor  # kappa / A without the penalties
    kappa: Tensor
    loss: Tensor


def row_terms(objective: Objective, log_pi: Tensor, advantages: Tensor, entropy: Tensor) -> RowTerms:
    """F4, kappa and F6 of each row under its rule (surrogates.py), with the penalties.

    Raises: ValueError for a surrogate that surrogates.py does not know; kernels, which compile that text, cannot.
    """
    for rule in objective.rules:
        if rule.surrogate not in SURROGATES:
            raise ValueError(
                f"surrogate must be one of {', '.join(SURROGATES)}, got {rule.surrogate!r}; see surrogates.py"
            )
    o, log_pi, entropy = objective, log_pi.double(), entropy.double()
    old_log_pi = log_pi if o.old_log_probs_R is None else o.old_log_probs_R
    coefficient, kappa, loss = surrogates.surrogate_terms(log_pi, old_log_pi, entropy, advantages, o)
    if o.given_R is not None:
        given = surrogates.surrogate_terms(log_pi, old_log_pi, entropy, advantages, o.given)
        coefficient, kappa, loss = map(partial(torch.where, o.given_R), given, (coefficient, kappa, loss))
    if o.beta != 0.0:
        log_ratio = formulas.log_ratio(o.ref_log_probs_R, log_pi)
        kappa = kappa + o.beta * formulas.kl_kappa(log_ratio, o.kl_cap, o.kl_estimator)
        loss = loss + o.beta * formulas.kl_loss(log_ratio, o.kl_cap, o.kl_estimator)
    if o.entropy_coef != 0.0:
        loss = loss - o.entropy_coef * entropy
    return RowTerms(coefficient, kappa, loss)


def entropy(block: Block) -> Tensor:
    """H of each row's distribution in nats; banned tokens (pi = 0) add nothing."""
    gap_CV = block.z_CV - block.top_C[:, None]
    pi_CV = torch.exp(gap_CV - block.log_mass_C[:, None])
    return formulas.entropy(block.log_mass_C, torch.where(pi_CV == 0.0, 0.0, pi_CV * gap_CV).sum(1))


class RowScales(NamedTuple):
    """What F7 multiplies a row's parts by, of shape (C,) or (R,). Where both are 0 the row is not read."""

    scale: Tensor  # weight·kappa
    tilt: Tensor  # weight·lambda
    entropy: Tensor  # the row's, in nats


def row_scales(
    call: RowCall, weights: Tensor, kappa: Tensor, entropy: Tensor, read: Tensor
) -> tuple[RowScales, Tensor]:
    """The scales of rows, 0 where they are not read, and what the backward multiplies the stored row by.

    Without `defer_scale` that is 1; with it the stored row is as large as FP16_PEAK lets it be.
    """
    scale = torch.where(read, formulas.weighed(weights, kappa), 0.0)
    tilt = torch.where(read, weights * call.objective.entropy_coef, 0.0)
    if not call.defer_scale:
        return RowScales(scale, tilt, entropy), torch.ones_like(scale, dtype=torch.float32)
    slope = abs(call.logit_scale / call.temperature)
    size = formulas.row_size(scale, tilt, entropy)
    unit = size.double() * slope / FP16_PEAK
    scale, tilt = (torch.where(unit == 0.0, 0.0, x / size * FP16_PEAK / slope) for x in (scale, tilt))
    largest = torch.finfo(torch.float32).max  # beyond, a stored 0 would become 0·inf
    return RowScales(scale, tilt, entropy), unit.clamp(max=largest).float()


def block_gradient(call: RowCall, block: Block, logits_CV: Tensor, targets_C: Tensor, scales_C: RowScales) -> Tensor:
    """F7 over a block of rows, with the transform's chain rule, rounded once to the dtype asked for."""
    log_pi_CV = (block.z_CV - block.top_C[:, None]) - block.log_mass_C[:, None]
    scales_C = RowScales(*(x.to(log_pi_CV.dtype) for x in scales_C))
    scale_CV, tilt_CV, entropy_CV = (x[:, None] for x in scales_C)
    gradient_CV = formulas.dlogit_other(log_pi_CV, scale_CV)
    log_pi_C = block.log_pi_C.to(log_pi_CV.dtype)
    at_target = formulas.dlogit_target(log_pi_C, scales_C.scale)
    if call.objective.entropy_coef != 0.0:
        gradient_CV = formulas.dlogit_tilted(log_pi_CV, scale_CV, tilt_CV, entropy_CV)
        at_target = at_target + formulas.dlogit_tilted(log_pi_C, 0.0, scales_C.tilt, scales_C.entropy)
    at_C1, inside_C = targets_C.clamp(0, gradient_CV.shape[1] - 1)[:, None], _inside(targets_C, gradient_CV)
    gradient_CV.scatter_(1, at_C1, torch.where(inside_C, at_target, gradient_CV.gather(1, at_C1)[:, 0])[:, None])
    slope = formulas.transform_slope(_widened(call, logits_CV), call.logit_scale, call.softcap, call.temperature)
    gradient_CV = torch.where((scale_CV == 0.0) & (tilt_CV == 0.0), 0.0, gradient_CV * slope)
    return gradient_CV.to(call.gradient_dtype or logits_CV.dtype)


def scale(
    gradient: Tensor,
    row_scale_R: Tensor | None,
    upstream: Tensor,
    inplace: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """gradient·row_scale·upstream in float32, rounded once to dtype (None: its own); upstream is () or (R,)."""
    factor = upstream.float() if row_scale_R is None else row_scale_R * upstream.float()
    factor_STV = factor.expand(gradient.shape[0] * gradient.shape[1]).reshape(*gradient.shape[:2], 1)
    out = gradient_for(gradient, inplace, dtype)
    for _, where in _row_blocks(gradient):
        out[where] = (gradient[where].float() * factor_STV[where]).to(out.dtype)
    return out
