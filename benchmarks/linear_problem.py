"""Inputs of the linear benchmark, made from a LinearCase alone, and the fp64 check of an answer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.harness import CHECK_UPSTREAM, Answer, Deviation
from benchmarks.row_problem import IGNORE_INDEX, credit, peak_shares, peak_tokens
from benchmarks.shapes import LinearCase
from benchmarks.truth import coefficients, deviation, relative_error

ERROR_LIMIT = {"float32": 2e-3, "bfloat16": 1e-1, "float16": 5e-2}
"""As for rows; wider in bf16, where the product rounds a logit of 15 to 0.06, so π by 6 %, before any loss sees it."""

SAMPLED_ROWS, SAMPLED_TOKENS = 64, 256


@dataclass(frozen=True)
class LinearProblem:
    """Hidden states and head, which no step overwrites. Rows of one response lie together."""

    case: LinearCase
    hidden_ND: Tensor  # leaf that requires grad
    weight_VD: Tensor  # leaf that requires grad
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
        self.upstream.fill_(upstream)

    @cached_property
    def target_logits_N(self) -> Tensor:
        """The logit of every row's target, fp64; of token 0 where there is none."""
        target_weight_ND = self.weight_VD.detach()[self.targets_N.clamp(min=0)]
        return (self.hidden_ND.detach().double() * target_weight_ND.double()).sum(1) / self.case.temperature

    @cached_property
    def log_masses_N(self) -> Tensor:
        """log Σ e^z of every row, fp64, in nats: one product of the full size, so it is kept for all contenders."""
        weight_DV = self.weight_VD.detach().double().t()
        rows = max(1, (1 << 25) // self.case.vocab)
        blocks = self.hidden_ND.detach().double().split(rows)
        return torch.cat([(block @ weight_DV / self.case.temperature).logsumexp(1) for block in blocks])

    def deviation(self, answer: Answer, objective: str) -> Deviation:
        """Deviation of the loss, of dX in sampled rows and of dW in sampled tokens, targets among them."""
        hidden_ND, weight_VD = self.hidden_ND.detach(), self.weight_VD.detach()
        dhidden_ND, dweight_VD = answer.gradients
        live_N, index_N = self.targets_N != IGNORE_INDEX, self.targets_N.clamp(min=0)
        kappa_N, loss_N = coefficients(
            self.target_logits_N - self.log_masses_N, self.advantages_N.double(), objective, self.case.tau
        )
        weight_N = live_N / max(self.live_rows, 1)
        scale_N = weight_N * kappa_N * CHECK_UPSTREAM / self.case.temperature
        loss_gap = abs(answer.loss.item() - (weight_N * loss_N).sum().item())
        loss_size = (weight_N * loss_N).abs().sum().item()

        rows_n = torch.linspace(0, self.case.rows - 1, min(SAMPLED_ROWS, self.case.rows)).long().to(index_N.device)
        dlogits_nV = self._dlogits(hidden_ND[rows_n], weight_VD, rows_n, None, scale_N)
        truth_nD = dlogits_nV @ weight_VD.double()
        dx_scales_n = scale_N[rows_n].abs() * weight_VD[index_N[rows_n]].double().norm(dim=1)
        dx_gaps_n = (dhidden_ND[rows_n].double() - truth_nD).norm(dim=1)
        of_dx = deviation(loss_gap, loss_size, dx_gaps_n, dx_scales_n, truth_nD.norm(dim=1))

        spread_v = torch.arange(0, self.case.vocab, max(1, self.case.vocab // SAMPLED_TOKENS), device=index_N.device)
        tokens_v = torch.cat([index_N[rows_n], spread_v]).unique()
        dlogits_Nv = self._dlogits(hidden_ND, weight_VD[tokens_v], None, tokens_v, scale_N)
        truth_vD = dlogits_Nv.t() @ hidden_ND.double()
        pulls_N = scale_N.abs() * hidden_ND.double().norm(dim=1)
        dw_scales_V = torch.zeros(self.case.vocab, dtype=torch.float64, device=index_N.device)
        dw_scales_V.index_add_(0, index_N, pulls_N)
        dw_gaps_v = (dweight_VD[tokens_v].double() - truth_vD).norm(dim=1)
        dw_sizes_v = truth_vD.norm(dim=1)
        # a token that is nobody's target has no scale of its own, only the size that all rows' π give it
        dw_error = relative_error(dw_gaps_v, torch.maximum(dw_scales_V[tokens_v], dw_sizes_v))
        dw_worst = relative_error(dw_gaps_v, dw_sizes_v)
        return Deviation(max(of_dx.scaled, dw_error), max(of_dx.worst_row, dw_worst))

    def _dlogits(self, hidden, weight, rows: Tensor | None, tokens: Tensor | None, scale_N: Tensor) -> Tensor:
        """F7 in fp64 on a block: some rows with all tokens, or all rows with some tokens (None: all)."""
        chosen = slice(None) if rows is None else rows
        columns = torch.arange(self.case.vocab, device=scale_N.device) if tokens is None else tokens
        logits = hidden.double() @ weight.double().t() / self.case.temperature
        probabilities = (logits - self.log_masses_N[chosen][:, None]).exp()
        is_target = columns[None, :] == self.targets_N.clamp(min=0)[chosen][:, None]
        return scale_N[chosen][:, None] * (probabilities - is_target.double())


def build_linear_problem(case: LinearCase) -> LinearProblem:
    """Normal hidden states, each leaning towards one token's row of the head so that π is about .5 to .999 there."""
    generator = torch.Generator(case.device).manual_seed(case.seed)
    weight_VD = torch.randn(case.vocab, case.hidden, generator=generator, device=case.device).div_(case.hidden**0.5)
    hidden_ND = torch.randn(case.rows, case.hidden, generator=generator, device=case.device)
    targets_N = torch.randint(case.vocab, (case.rows,), generator=generator, device=case.device)
    # the other logits are about standard normal: log Σ e^z = log V + 1/2
    height_N = torch.logit(peak_shares(case.rows, case.device)) + math.log(case.vocab) + 0.5
    peak_ND = weight_VD[peak_tokens(targets_N, case.vocab, generator)]
    hidden_ND += (height_N / peak_ND.square().sum(1))[:, None] * peak_ND
    advantages_N, targets_N = credit(case, targets_N, generator)
    dtype = getattr(torch, case.dtype)
    return LinearProblem(
        case=case,
        hidden_ND=hidden_ND.to(dtype).requires_grad_(),
        weight_VD=weight_VD.to(dtype).requires_grad_(),
        targets_N=targets_N,
        advantages_N=advantages_N,
        upstream=torch.ones((), device=case.device),
        live_rows=int((targets_N != IGNORE_INDEX).sum()),
    )
