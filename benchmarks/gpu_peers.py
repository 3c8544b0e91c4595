"""Other libraries' GPU kernels for the loss over logits. Each is imported when it is asked for, never before."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import traffic
from benchmarks.harness import Absent, AbsentError, Answer, Contender, sentence
from benchmarks.row_losses import gft_of_log_probs, tempered
from benchmarks.row_problem import IGNORE_INDEX, RowProblem


def absent_peer(name: str, module: str, device: str) -> Absent | None:
    """Why a peer made of GPU kernels cannot be asked here, or None."""
    package = module.split(".")[0]
    try:
        importlib.import_module(module)
    except Exception as error:  # optional packages fail to import in more ways than ImportError
        return Absent(name, f"`import {module}` fails: {sentence(error)}")
    if device != "cuda":
        return Absent(name, f"{package}'s kernels run on a GPU only, and this run is on the CPU")
    return None


def liger_cross_entropy(logits_NV: Tensor, problem: RowProblem) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(tempered(logits_NV, problem), problem.targets_N, ignore_index=IGNORE_INDEX)


def liger_grpo(name: str, problem: RowProblem) -> Contender | Absent:
    absent = absent_peer(name, "liger_kernel.transformers.grpo_loss", problem.case.device)
    if absent:
        return absent
    try:
        return Contender(name, _liger_grpo_step(problem), "grpo", traffic.TWO_PASS)
    except AbsentError as reason:
        return Absent(name, str(reason))


def _liger_grpo_step(problem: RowProblem) -> Callable[[], Answer]:
    """Liger reads (S, T + 1, V) logits and skips the last position of each response; the copy is made once, here."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    case = problem.case
    if case.rows % case.responses:
        raise AbsentError(f"it takes responses of one length, and {case.rows} rows do not divide by {case.responses}")
    shape_ST = (case.responses, case.rows // case.responses)
    wide_SUV = F.pad(problem.pristine_NV.view(*shape_ST, case.vocab), (0, 0, 0, 1)).requires_grad_()
    targets_ST = problem.targets_N.view(shape_ST)
    live_ST = targets_ST != IGNORE_INDEX
    advantages_S = problem.advantages_N.view(shape_ST)[:, 0].contiguous()

    def step() -> Answer:
        losses_ST, _kl, _clipped = triton_grpo_loss(
            wide_SUV,
            old_logp=None,
            ref_logp=None,
            completion_ids=targets_ST.clamp(min=0),
            advantages=advantages_S,
            completion_mask=live_ST,
            temperature=case.temperature,
            beta=0.0,
            inplace=False,
        )
        value = (losses_ST * live_ST).sum() / live_ST.sum()
        (gradient_SUV,) = torch.autograd.grad(value, wide_SUV, problem.upstream.to(value.dtype))
        return Answer(value.detach(), (gradient_SUV[:, :-1],))

    return step


def quack_cross_entropy(logits_NV: Tensor, problem: RowProblem) -> Tensor:
    from quack.cross_entropy import cross_entropy

    tempered_NV, targets_N = tempered(logits_NV, problem), problem.targets_N
    total = cross_entropy(tempered_NV, targets_N, ignore_index=IGNORE_INDEX, reduction="sum", inplace_backward=True)
    return total / problem.live_rows


def trl_loss(logits_NV: Tensor, problem: RowProblem) -> Tensor:
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    log_pi_N, _entropy = selective_log_softmax_and_entropy(
        logits_NV[None], problem.targets_N.clamp(min=0)[None], problem.case.temperature
    )
    return gft_of_log_probs(log_pi_N[0], problem)
