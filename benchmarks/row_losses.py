"""The row loss in plain torch, in the ways people write it, and the step that runs any row loss.

One signature: loss(logits_NV, problem) -> scalar loss, token mean over the live rows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Answer
from benchmarks.row_problem import IGNORE_INDEX, RowProblem

RowLoss = Callable[[Tensor, RowProblem], Tensor]


class _Head(torch.autograd.Function):
    """Stands for the layer below the loss: hands out logits that are no leaf and keeps the gradient that comes back."""

    @staticmethod
    def forward(ctx, anchor: Tensor, logits_NV: Tensor, kept: list[Tensor]) -> Tensor:
        ctx.kept = kept
        # a tensor of its own on the same storage: autograd refuses in-place work on a view made in a custom function
        return torch.empty(0, dtype=logits_NV.dtype, device=logits_NV.device).set_(logits_NV)

    @staticmethod
    def backward(ctx, gradient_NV: Tensor):
        ctx.kept.append(gradient_NV)
        return None, None, None


def step_of(
    loss: RowLoss, problem: RowProblem, around: Callable[[], AbstractContextManager] = nullcontext
) -> Callable[[], Answer]:
    """Forward and backward of one loss under the problem's upstream gradient, both inside `around`."""
    anchor = torch.zeros((), device=problem.logits_NV.device, requires_grad=True)

    def step() -> Answer:
        kept: list[Tensor] = []
        with around():
            value = loss(_Head.apply(anchor, problem.logits_NV, kept), problem)
            value.backward(problem.upstream.to(value.dtype))
        return Answer(value.detach(), tuple(kept))

    return step


def paper_loss(logits_NV: Tensor, problem: RowProblem) -> Tensor:
    """The paper's own formulation, in the logits' dtype: a tempered clone, cross-entropy, a full softmax, a gather."""
    case, targets_N = problem.case, problem.targets_N
    live_N = targets_N != IGNORE_INDEX
    tempered_NV = logits_NV.clone() / case.temperature
    nll_N = F.cross_entropy(tempered_NV, targets_N, reduction="none", ignore_index=IGNORE_INDEX)
    pi_N = torch.softmax(tempered_NV, dim=-1).gather(1, targets_N.clamp(min=0)[:, None])[:, 0].detach()
    coefficient_N = torch.where(pi_N < case.tau, pi_N, torch.ones_like(pi_N))
    return (problem.advantages_N * coefficient_N * nll_N * live_N).sum() / live_N.sum()


def lean_loss(logits_NV: Tensor, problem: RowProblem) -> Tensor:
    """What a careful user writes: one fp32 log-softmax, one gather, the coefficient from its exponential."""
    return gft_of_log_probs(_log_probs(logits_NV, problem), problem)


def gft_of_log_probs(log_pi_N: Tensor, problem) -> Tensor:
    """The three lines that turn log-probabilities of the targets into the GFT loss (token mean)."""
    live_N = problem.targets_N != IGNORE_INDEX
    pi_N = log_pi_N.detach().exp()
    kappa_N = problem.advantages_N * torch.where(pi_N < problem.case.tau, pi_N, 1.0)
    return -torch.where(live_N, kappa_N * log_pi_N, 0.0).sum() / live_N.sum()


def _log_probs(logits_NV: Tensor, problem: RowProblem) -> Tensor:
    log_pi_NV = torch.log_softmax(tempered(logits_NV, problem), dim=-1, dtype=torch.float32)
    return log_pi_NV.gather(1, problem.targets_N.clamp(min=0)[:, None])[:, 0]


def cross_entropy(logits_NV: Tensor, problem: RowProblem) -> Tensor:
    return F.cross_entropy(tempered(logits_NV, problem), problem.targets_N, ignore_index=IGNORE_INDEX)


def tempered(logits_NV: Tensor, problem: RowProblem) -> Tensor:
    return logits_NV if problem.case.temperature == 1 else logits_NV / problem.case.temperature
