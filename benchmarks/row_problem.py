"""Inputs of the row benchmark, made from a RowCase alone, and the fp64 check of an answer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness import CHECK_UPSTREAM, Answer, Deviation
from benchmarks.shapes import LinearCase, RowCase
from benchmarks.truth import deviation, row_truth

IGNORE_INDEX = -100
ERROR_LIMIT = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 3e-2}
"""Largest deviation that still counts as an answer: above any rounding of the dtype, far below any wrong formula."""


@dataclass(frozen=True)
class RowProblem:
    """Logits a contender may overwrite, and what it needs besides. Rows of one response lie together."""

    case: RowCase
    logits_NV: Tensor  # rewritten before every step
    pristine_NV: Tensor
    targets_N: Tensor  # int64; IGNORE_INDEX on masked rows
    advantages_N: Tensor  # float32
    upstream: Tensor  # () float32, set by prepare
    live_rows: int

    @property
    def limit(self) -> float:
        return ERROR_LIMIT[self.case.dtype]

    @property
    def timed_upstream(self) -> float:
        return self.case.upstream

    def prepare(self, upstream: float) -> None:
        """Put back the logits, for whoever overwrote them and for whoever did not: the same cache for all."""
        self.logits_NV.copy_(self.pristine_NV)
        self.upstream.fill_(upstream)

    def deviation(self, answer: Answer, objective: str) -> Deviation:
        """Deviation of loss and gradient from fp64, a few rows at a time."""
        case, (gradient_NV,) = self.case, answer.gradients
        gradient_NV = gradient_NV.reshape(case.rows, case.vocab)
        truth_loss, loss_size, gaps, scales, sizes = 0.0, 0.0, [], [], []
        for start in range(0, case.rows, step := max(1, (1 << 22) // case.vocab)):
            block = slice(start, start + step)
            losses_n, scale_n, truth_nV = row_truth(
                self.pristine_NV[block].double() / case.temperature,
                self.targets_N[block],
                self.advantages_N[block],
                1 / max(self.live_rows, 1),
                objective,
                case.tau,
                CHECK_UPSTREAM / case.temperature,
            )
            truth_loss += losses_n.sum().item()
            loss_size += losses_n.abs().sum().item()
            scales.append(scale_n)
            sizes.append(truth_nV.norm(dim=1))
            gaps.append((gradient_NV[block].double() - truth_nV).norm(dim=1))
        loss_gap = abs(answer.loss.item() - truth_loss)
        return deviation(loss_gap, loss_size, torch.cat(gaps), torch.cat(scales), torch.cat(sizes))


def build_row_problem(case: RowCase) -> RowProblem:
    """The inputs of a case, made on its device: the same for the same seed, whatever the dtype (up to its rounding)."""
    generator = torch.Generator(case.device).manual_seed(case.seed)
    logits_NV = torch.randn(case.rows, case.vocab, generator=generator, device=case.device)
    targets_N = torch.randint(case.vocab, (case.rows,), generator=generator, device=case.device)
    if case.logits == "peaked":
        _raise_peaks(logits_NV, targets_N, generator)
    advantages_N, targets_N = credit(case, targets_N, generator)
    pristine_NV = logits_NV.to(getattr(torch, case.dtype))
    return RowProblem(
        case=case,
        logits_NV=pristine_NV.clone(),
        pristine_NV=pristine_NV,
        targets_N=targets_N,
        advantages_N=advantages_N,
        upstream=torch.ones((), device=case.device),
        live_rows=int((targets_N != IGNORE_INDEX).sum()),
    )


def credit(case: RowCase | LinearCase, targets_N: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Advantages (N,) float32 of normal rewards, and targets with the dead part of the case taken out."""
    row_N = torch.arange(case.rows, device=case.device)
    response_N = row_N * case.responses // case.rows
    rewards_S = torch.randn(case.responses, generator=generator, device=case.device)
    advantages_S = (rewards_S - rewards_S.mean()) / (rewards_S.std() + 1e-6)
    if case.dead == "zero-advantage":
        response_S = torch.arange(case.responses, device=case.device)
        advantages_S[response_S * case.dead_share % 1 < case.dead_share] = 0.0  # spread evenly; half: every other one
    if case.dead == "masked":  # the end of each response, as padding is
        position_N = row_N - torch.searchsorted(response_N, response_N)
        length_N = torch.bincount(response_N, minlength=case.responses)[response_N]
        targets_N = torch.where(position_N < (1 - case.dead_share) * length_N, targets_N, IGNORE_INDEX)
    return advantages_S[response_N], targets_N


def peak_tokens(targets_N: Tensor, vocab: int, generator: torch.Generator) -> Tensor:
    """The likely token of each row: in three rows of four the target."""
    hits_N = torch.rand(targets_N.shape, generator=generator, device=targets_N.device) < 0.75
    return torch.where(hits_N, targets_N, (targets_N + 1) % vocab)


def peak_shares(rows: int, device: str) -> Tensor:
    """The probability (N,) of each row's likely token, as a trained model has them."""
    return torch.linspace(0.5, 0.999, rows, device=device)


def _raise_peaks(logits_NV: Tensor, targets_N: Tensor, generator: torch.Generator) -> None:
    """Set the likely token's logit so that it has its share of the row."""
    rows, vocab = logits_NV.shape
    peak_N1 = peak_tokens(targets_N, vocab, generator)[:, None]
    logits_NV.scatter_(1, peak_N1, -math.inf)
    share_N1 = peak_shares(rows, logits_NV.device)[:, None]
    logits_NV.scatter_(1, peak_N1, logits_NV.logsumexp(1, keepdim=True) + torch.logit(share_N1))
