"""Other libraries' losses over hidden states and output head. Each is imported when it is asked for, never before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from benchmarks.harness import AbsentError
from benchmarks.linear_problem import LinearProblem
from benchmarks.row_losses import gft_of_log_probs
from benchmarks.row_problem import IGNORE_INDEX

TRL_TILE = 8192
"""Vocabulary columns that TRL's function projects at a time; its tiles have 4096 rows."""


def tempered(hidden_ND: Tensor, problem: LinearProblem) -> Tensor:
    """For losses that know no temperature: dividing the hidden states divides the logits."""
    return hidden_ND if problem.case.temperature == 1 else hidden_ND / problem.case.temperature


def trl_log_probs(hidden_ND: Tensor, weight_VD: Tensor, problem: LinearProblem) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    targets_N, temperature = problem.targets_N.clamp(min=0), problem.case.temperature
    tensors, nothing = (hidden_ND, weight_VD, None, targets_N), ()
    log_pi_N, *_ = ChunkedLogProbFunction.apply(*tensors, temperature, TRL_TILE, None, 1.0, nothing)
    return log_pi_N


def _trl_loss(hidden_ND: Tensor, weight_VD: Tensor, problem: LinearProblem) -> Tensor:
    return gft_of_log_probs(trl_log_probs(hidden_ND, weight_VD, problem), problem)


def _liger_grpo(hidden_ND: Tensor, weight_VD: Tensor, problem: LinearProblem) -> Tensor:
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

    case = problem.case
    if case.rows % case.responses:
        raise AbsentError(f"it takes responses of one length, and {case.rows} rows do not divide by {case.responses}")
    shape_ST = (case.responses, case.rows // case.responses)
    targets_ST = problem.targets_N.view(shape_ST)
    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, loss_type="bnpo", use_ref_model=False, temperature=case.temperature, compiled=case.device == "cuda"
    )
    value, _metrics = loss(
        hidden_ND.view(*shape_ST, case.hidden),
        weight_VD,
        targets_ST.clamp(min=0),
        (targets_ST != IGNORE_INDEX).float(),
        problem.advantages_N.view(shape_ST)[:, 0].contiguous(),
    )
    return value


def _liger_cross_entropy(chunks: int, hidden_ND: Tensor, weight_VD: Tensor, problem: LinearProblem) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(
        tempered(hidden_ND, problem), weight_VD, problem.targets_N, ignore_index=IGNORE_INDEX, chunk_mem_const=chunks
    )


def _cut_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, problem: LinearProblem) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(tempered(hidden_ND, problem), weight_VD, problem.targets_N, ignore_index=IGNORE_INDEX)


def _quack_loss(hidden_ND: Tensor, weight_VD: Tensor, problem: LinearProblem) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(
        tempered(hidden_ND, problem), weight_VD, problem.targets_N, ignore_index=IGNORE_INDEX
    )


@dataclass(frozen=True)
class Library:
    """A loss and where it comes from; `on_cpu`: it runs there too."""

    module: str
    loss: Callable[[Tensor, Tensor, Any], Tensor]
    objective: str
    on_cpu: bool = False


_LIGER = "liger_kernel.transformers.functional"
LOSSES = {
    "TRL chunked log-probabilities + 3 lines": Library("trl.kernels.chunked_logprob", _trl_loss, "gft", True),
    "Liger fused linear GRPO": Library("liger_kernel.chunked_loss.grpo_loss", _liger_grpo, "grpo", True),
    "Liger fused linear cross-entropy": Library(_LIGER, partial(_liger_cross_entropy, 1), "cross-entropy"),
    # by default Liger's chunk of logits is about as large as the hidden states; larger ones cost memory, save time
    "Liger fused linear cross-entropy, 8 × chunks": Library(_LIGER, partial(_liger_cross_entropy, 8), "cross-entropy"),
    "CCE": Library("cut_cross_entropy", _cut_cross_entropy, "cross-entropy"),
    "quack chunked linear cross-entropy": Library("quack.linear_cross_entropy", _quack_loss, "cross-entropy"),
}
