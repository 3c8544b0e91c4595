"""The reference backend: the loss and its gradient in plain torch, a block of rows at a time, on any device.

It is the readable definition of what a backend does, and what the others are compared with in daily use.
Sizes: C rows of a block, V vocabulary; S, T, R as in options.py.
"""

from __future__ import annotations

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
    for chosen in torch.arange(rows, device=logits.device).split(max(1, BLOCK_BYTES // (4 * logits.shape[-1]))):
        where = (chosen // logits.shape[1], chosen % logits.shape[1])
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
    z_CV = formulas.transform(logits_CV.float(), call.logit_scale, call.softcap, call.temperature)
    inside_C = (targets_C >= 0) & (targets_C < z_CV.shape[1])
    at_C1 = targets_C.clamp(0, z_CV.shape[1] - 1)[:, None]
    target_logit_C = z_CV.gather(1, at_C1)[:, 0]
    others_CV = z_CV.scatter(1, at_C1, formulas.NEG_INF)
    others_top_C = others_CV.amax(1)
    anchor_C = torch.where(others_top_C == formulas.NEG_INF, 0.0, others_top_C)
    others_mass_C = torch.exp(others_CV - anchor_C[:, None]).sum(1)
    log_pi_C = formulas.log_prob(target_logit_C, others_top_C, others_mass_C)
    top_C, mass_C = formulas.observe(others_top_C, others_mass_C, target_logit_C)
    return Block(z_CV, top_C, mass_C, torch.where(inside_C, log_pi_C, float("nan")))


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
    gradient_CV.scatter_(1, targets_C.clamp(0, gradient_CV.shape[1] - 1)[:, None], at_target[:, None])
    slope = formulas.transform_slope(logits_CV.float(), call.logit_scale, call.softcap, call.temperature)
    gradient_CV = torch.where(scale_CV == 0.0, 0.0, gradient_CV * slope)
    return gradient_CV.to(logits_CV.dtype)


def scale(gradient: Tensor, row_scale_R: Tensor | None, upstream: Tensor, inplace: bool) -> Tensor:
    """gradient·row_scale·upstream in float32, rounded once; upstream is () or (R,)."""
    factor = upstream.float() if row_scale_R is None else row_scale_R * upstream.float()
    rows, vocabulary = gradient.shape[0] * gradient.shape[1], gradient.shape[2]
    factor_STV = factor.expand(rows).reshape(*gradient.shape[:2], 1)
    out = gradient if inplace else torch.empty_like(gradient, memory_format=torch.contiguous_format)
    block = max(1, BLOCK_BYTES // (4 * max(vocabulary, 1)))
    for chosen in torch.arange(rows, device=gradient.device).split(block):
        where = (chosen // gradient.shape[1], chosen % gradient.shape[1])
        out[where] = (gradient[where].float() * factor_STV[where]).to(gradient.dtype)
    return out
