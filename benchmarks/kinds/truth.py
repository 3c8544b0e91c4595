"""The fp64 truth a contender must agree with before it is timed. Imports nothing from the library.

Objectives differ in the row coefficient κ alone: ∂L/∂z[r,v] = w[r]·κ[r]·(π[r,v] − [v = y]).
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness import Deviation

OBJECTIVES = ("gft", "cross-entropy", "grpo")
"""gft: κ = A·C(π). cross-entropy: κ = 1. grpo: κ = A, on-policy (the ratio is 1) and without KL."""


def coefficients(log_pi_N: Tensor, advantages_N: Tensor, objective: str, tau: float) -> tuple[Tensor, Tensor]:
    """κ and the loss of each row, fp64, from log π of its target in nats."""
    ones_N = torch.ones_like(log_pi_N)
    if objective == "cross-entropy":
        return ones_N, -log_pi_N
    if objective == "grpo":
        return advantages_N, -advantages_N
    assert objective == "gft", objective
    pi_N = log_pi_N.exp()
    kappa_N = advantages_N * torch.where(pi_N < tau, pi_N, ones_N)
    return kappa_N, -kappa_N * log_pi_N


def row_truth(
    logits_NV: Tensor, targets_N: Tensor, advantages_N: Tensor, weight: float, objective: str, tau: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (N,), row scales w·κ (N,) and gradient (N, V) in fp64 for a block of rows; targets < 0 do not count.

    weight: of a live row under the reduction. scale: upstream gradient, applied to the gradient only. Logits are
    divided by the temperature already; the chain rule's factor 1/temperature belongs to `scale`.
    """
    live_N = targets_N >= 0
    index_N1 = targets_N.clamp(min=0)[:, None]
    log_pi_NV = torch.log_softmax(logits_NV.double(), dim=-1)
    kappa_N, loss_N = coefficients(log_pi_NV.gather(1, index_N1)[:, 0], advantages_N.double(), objective, tau)
    row_scale_N = torch.where(live_N, scale * weight * kappa_N, 0.0)
    gradient_NV = log_pi_NV.exp_().mul_(row_scale_N[:, None])
    gradient_NV.scatter_add_(1, index_N1, -row_scale_N[:, None])
    return torch.where(live_N, weight * loss_N, 0.0), row_scale_N.abs(), gradient_NV


def deviation(loss_gap: float, loss_size: float, gaps_N: Tensor, scales_N: Tensor, sizes_N: Tensor) -> Deviation:
    """Put loss and row gaps in proportion.

    loss_size: the sum of the absolute row losses, since signed ones cancel. scales_N: |w·κ|, the size a row's gradient
    has at π = 0. sizes_N: the size it has.
    """
    scaled = max(loss_gap / max(loss_size, torch.finfo(torch.float32).tiny), relative_error(gaps_N, scales_N))
    return Deviation(float("inf") if loss_gap != loss_gap else scaled, relative_error(gaps_N, sizes_N))


def relative_error(gaps: Tensor, sizes: Tensor) -> float:
    """The largest gap of any row, each against its own size, or a thousandth of the largest where it is smaller.

    gaps: (N,) Euclidean norm of a row's error. NaN and infinities count as infinite.
    """
    if sizes.numel() == 0:
        return 0.0
    floor = max(sizes.max().item() * 1e-3, torch.finfo(torch.float32).tiny)
    worst = (gaps / sizes.clamp(min=floor)).nan_to_num(nan=float("inf"), posinf=float("inf")).max().item()
    return float(worst)
