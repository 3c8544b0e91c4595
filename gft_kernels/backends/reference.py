"""The reference backend: the loss and its gradient in plain torch, a block of rows at a time, on any device.

It is the readable definition of what a backend does, and what the others are compared with in daily use.
Sizes: C rows of a block, V vocabulary; S, T, R as in options.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gft_kernels import formulas
from gft_kernels.advantages import RowCredit, credit_rows
from gft_kernels.options import FP16_PEAK, RowCall, RowResult

BLOCK_BYTES = 64 << 20
"""Float32 logits held at a time: large enough to hide the Python loop, small beside any logits worth a kernel."""


def absent() -> str | None:
    return None


def refuses(call: RowCall) -> str | None:
    return None


class Block(NamedTuple):
    """Statistics of C rows; float32 of shape (C,), except the transformed logits (C, V). State of the whole row."""

    z_CV: Tensor
    top_C: Tensor
    mass_C: Tensor
    log_pi_C: Tensor


def run(call: RowCall) -> RowResult:
    """Loss, statistics and, if wanted, the gradient of a call; see `RowResult`."""
    logits = call.logits_STV.detach()
    credit = credit_rows(call.credit)
    rows = credit.live_R.numel()
    out = {name: torch.zeros(rows, device=logits.device) for name in ("loss", "log_prob", "coefficient", "entropy")}
    row_scale_R = torch.zeros(rows, device=logits.device) if call.defer_scale else None
    gradient = None
    if call.want_gradient:
        gradient = logits if call.inplace else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    for chosen, where in _row_blocks(logits, torch.arange(rows, device=logits.device)):
        part = RowCredit(*(column[chosen] for column in credit))
        block = statistics(call, logits[where], call.credit.targets_R[chosen])
        read_C = part.live_R if call.want_stats or call.want_entropy else part.live_R & (part.advantages_R != 0.0)
        coefficient, kappa = row_kappa(call, block.log_pi_C, part.advantages_R)
        loss = part.weights_R * formulas.token_loss(block.log_pi_C, kappa)
        out["loss"][chosen] = torch.where(part.live_R, loss, 0.0)
        out["log_prob"][chosen] = torch.where(read_C, block.log_pi_C, 0.0)
        out["coefficient"][chosen] = torch.where(read_C, coefficient, 0.0)
        if call.want_entropy:
            out["entropy"][chosen] = torch.where(read_C, entropy(block), 0.0)
        if gradient is not None:
            scale = torch.where(part.live_R, part.weights_R * kappa, 0.0)
            if row_scale_R is not None:
                scale, row_scale_R[chosen] = split_scale(call, scale)
            gradient[where] = block_gradient(call, block, logits[where], call.credit.targets_R[chosen], scale)
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
    log_pi_C = formulas.log_prob(target_logit_C, others_top_C, others_mass_C)
    top_C, mass_C = formulas.observe(others_top_C, others_mass_C, target_logit_C)
    return Block(z_CV, top_C, mass_C, torch.where(inside_C, log_pi_C, float("nan")))


def _apart(call: RowCall, logits_CV: Tensor, columns_C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Transformed logits, each row's target logit (0 if outside), whether it is inside, and the logits without it."""
    z_CV = formulas.transform(logits_CV.float(), call.logit_scale, call.softcap, call.temperature)
    inside_C = _inside(columns_C, z_CV)
    at_C1 = columns_C.clamp(0, z_CV.shape[1] - 1)[:, None]
    found_C1 = z_CV.gather(1, at_C1)
    others_CV = z_CV.scatter(1, at_C1, torch.where(inside_C[:, None], formulas.NEG_INF, found_C1))
    return z_CV, torch.where(inside_C, found_C1[:, 0], 0.0), inside_C, others_CV


def _inside(columns_C: Tensor, z_CV: Tensor) -> Tensor:
    return (columns_C >= 0) & (columns_C < z_CV.shape[1])


def _state(z_CV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """F1 over whole rows: top, mass, and e^(z - top), whose sum the mass is."""
    top_C = z_CV.amax(1)
    anchor_C = torch.where(top_C == formulas.NEG_INF, 0.0, top_C)
    share_CV = torch.exp(z_CV - anchor_C[:, None])
    return top_C, share_CV.sum(1), share_CV


class ShardStatistics(NamedTuple):
    """A vocabulary shard's part of each row; float32 (R,). The state leaves the target out, as F3 wants it."""

    top_R: Tensor
    mass_R: Tensor  # sum of e^(z - top)
    gap_R: Tensor  # sum of e^(z - top)·(z - top), for the entropy
    target_logit_R: Tensor  # transformed; 0 where the target lies in another shard


def shard_statistics(call: RowCall, columns_R: Tensor, read_R: Tensor) -> ShardStatistics:
    """F1 over a vocabulary shard; see `ShardStatistics`.

    columns_R: (R,) int64, the target's column in this shard, or anything outside [0, V) if it lies in another.
    read_R: (R,) bool; rows it leaves out give the neutral state.
    """
    out = ShardStatistics(*torch.zeros(4, columns_R.numel(), device=columns_R.device))
    out.top_R.fill_(formulas.NEG_INF)
    for chosen, where in _row_blocks(call.logits_STV, read_R.nonzero()[:, 0]):
        _, target_logit_C, _, others_CV = _apart(call, call.logits_STV[where], columns_R[chosen])
        top_C, mass_C, share_CV = _state(others_CV)
        gap_CV = torch.where(share_CV == 0.0, 0.0, share_CV * (others_CV - top_C[:, None]))
        for column, value in zip(out, (top_C, mass_C, gap_CV.sum(1), target_logit_C), strict=True):
            column[chosen] = value
    return out


def shard_gradient(
    call: RowCall, columns_R: Tensor, log_pi_R: Tensor, top_R: Tensor, log_mass_R: Tensor, scale_R: Tensor
) -> Tensor:
    """F7 over a vocabulary shard, from the whole row's log pi, top, log mass and scale = weight·kappa, float32 (R,)."""
    logits = call.logits_STV.detach()
    gradient = logits if call.inplace else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    for chosen, where in _row_blocks(logits, torch.arange(columns_R.numel(), device=logits.device)):
        z_CV = formulas.transform(logits[where].float(), call.logit_scale, call.softcap, call.temperature)
        block = Block(z_CV, top_R[chosen], torch.exp(log_mass_R[chosen]), log_pi_R[chosen])
        gradient[where] = block_gradient(call, block, logits[where], columns_R[chosen], scale_R[chosen])
    return gradient


def _row_blocks(logits_STV: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
    """Rows a block at a time, flat and as indices into S and T."""
    for chosen in rows.split(max(1, BLOCK_BYTES // (4 * max(logits_STV.shape[-1], 1)))):
        yield chosen, (chosen // logits_STV.shape[1], chosen % logits_STV.shape[1])


def row_kappa(call: RowCall, log_pi: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """F4 and kappa of each row, under the call's tau and rectify."""
    tau = formulas.row_tau(advantages, call.tau, call.rectify == "all")
    coefficient = formulas.coefficient(log_pi, tau)
    return coefficient, formulas.kappa(advantages, coefficient)


def entropy(block: Block) -> Tensor:
    """H of each row's distribution in nats; banned tokens (pi = 0) add nothing."""
    gap_CV = block.z_CV - block.top_C[:, None]
    pi_CV = torch.exp(gap_CV) / block.mass_C[:, None]
    return formulas.entropy(torch.log(block.mass_C), torch.where(pi_CV == 0.0, 0.0, pi_CV * gap_CV).sum(1))


def split_scale(call: RowCall, scale: Tensor) -> tuple[Tensor, Tensor]:
    """An fp16 row's scale as (what the stored row carries, what the backward multiplies by)."""
    slope = call.logit_scale / call.temperature
    stored = torch.where(scale == 0.0, 0.0, torch.copysign(torch.full_like(scale, FP16_PEAK), scale * slope))
    return stored / slope, (scale * slope).abs() / FP16_PEAK


def block_gradient(call: RowCall, block: Block, logits_CV: Tensor, targets_C: Tensor, scale_C: Tensor) -> Tensor:
    """F7 over a block of rows, with the transform's chain rule, rounded once to the logits' dtype."""
    log_pi_CV = (block.z_CV - block.top_C[:, None]) - torch.log(block.mass_C)[:, None]
    scale_CV = scale_C[:, None]
    gradient_CV = formulas.dlogit_other(log_pi_CV, scale_CV)
    at_target = formulas.dlogit_target(block.log_pi_C, scale_C)
    at_C1, inside_C = targets_C.clamp(0, gradient_CV.shape[1] - 1)[:, None], _inside(targets_C, gradient_CV)
    gradient_CV.scatter_(1, at_C1, torch.where(inside_C, at_target, gradient_CV.gather(1, at_C1)[:, 0])[:, None])
    slope = formulas.transform_slope(logits_CV.float(), call.logit_scale, call.softcap, call.temperature)
    gradient_CV = torch.where(scale_CV == 0.0, 0.0, gradient_CV * slope)
    return gradient_CV.to(logits_CV.dtype)


def scale(gradient: Tensor, row_scale_R: Tensor | None, upstream: Tensor, inplace: bool) -> Tensor:
    """gradient·row_scale·upstream in float32, rounded once; upstream is () or (R,)."""
    factor = upstream.float() if row_scale_R is None else row_scale_R * upstream.float()
    rows = gradient.shape[0] * gradient.shape[1]
    factor_STV = factor.expand(rows).reshape(*gradient.shape[:2], 1)
    out = gradient if inplace else torch.empty_like(gradient, memory_format=torch.contiguous_format)
    for _, where in _row_blocks(gradient, torch.arange(rows, device=gradient.device)):
        out[where] = (gradient[where].float() * factor_STV[where]).to(gradient.dtype)
    return out
