"""Contenders of the linear benchmark. One signature: loss(hidden_ND, weight_VD, problem) -> scalar loss.

The gradients asked for are those of the hidden states and of the head, so three products are the least.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import linear_libraries
from benchmarks.bare_products import bare_products_step
from benchmarks.gpu_peers import absent_peer
from benchmarks.harness import Absent, AbsentError, Answer, Contender
from benchmarks.linear_problem import LinearProblem
from benchmarks.peers import BACKENDS, compile_or_absent
from benchmarks.row_losses import gft_of_log_probs
from benchmarks.row_problem import IGNORE_INDEX

LinearLoss = Callable[[Tensor, Tensor, Any], Tensor]
StepOf = Callable[[LinearLoss, Any], Callable[[], Answer]]
Maker = Callable[[str, Any], "Contender | Absent"]
FLOOR = "floor: three bare products"


def linear_contenders(problem: LinearProblem, only: str = "") -> list[Contender | Absent]:
    """Everyone who can be asked on this problem; `only` keeps the floor and the names that contain it.

    backend="auto" is another entry's twin, so it comes only when it is asked for. A case that sets our chunk size has
    nothing new to ask of others.
    """
    everyone = makers()
    names = [name for name in everyone if "auto" not in name or "auto" in only]
    if problem.case.chunk_rows is not None:
        names = [name for name in names if name.startswith(("floor", "gft_linear_loss"))]
    return [everyone[name](name, problem) for name in names if name == FLOOR or only in name]


def linear_contender(problem: LinearProblem, name: str) -> Contender | Absent:
    """The one of that name."""
    return makers()[name](name, problem)


def makers(step_of: StepOf | None = None) -> dict[str, Maker]:
    """How each contender is made. step_of: what a step does with a loss; None: forward and backward of it alone."""
    step_of = step_of or forward_and_backward
    return {
        FLOOR: _floor,
        **{f"gft_linear_loss {backend}": partial(_ours, backend, step_of) for backend in BACKENDS},
        "eager PyTorch, lean": partial(_torch, eager_loss, "gft", step_of),
        "torch.compile of lean": partial(_compiled, step_of),
        "F.linear_cross_entropy": partial(_torch, _linear_cross_entropy, "cross-entropy", step_of),
        "F.linear_cross_entropy, chunked": partial(_torch, _chunked_cross_entropy, "cross-entropy", step_of),
        **{name: partial(_library, library, step_of) for name, library in linear_libraries.LOSSES.items()},
    }  # fmt: skip


def forward_and_backward(loss: LinearLoss, problem: LinearProblem) -> Callable[[], Answer]:
    """Loss and gradients under the problem's upstream gradient."""

    def step() -> Answer:
        hidden_ND, weight_VD = problem.hidden_ND, problem.weight_VD
        value = loss(hidden_ND, weight_VD, problem)
        gradients = torch.autograd.grad(value, (hidden_ND, weight_VD), problem.upstream.to(value.dtype))
        return Answer(value.detach(), gradients)

    return step


def _floor(name: str, problem: LinearProblem) -> Contender:
    return Contender(name, bare_products_step(problem.hidden_ND, problem.weight_VD), None)


def _torch(loss: LinearLoss, objective: str, step_of: StepOf, name: str, problem) -> Contender:
    return Contender(name, step_of(loss, problem), objective)


def _compiled(step_of: StepOf, name: str, problem) -> Contender:
    return Contender(name, step_of(compile_or_absent(eager_loss), problem), "gft")


def _library(library: linear_libraries.Library, step_of: StepOf, name: str, problem) -> Contender | Absent:
    absent = absent_peer(name, library.module, "cuda" if library.on_cpu else problem.case.device)
    return absent or Contender(name, step_of(library.loss, problem), library.objective)


def _ours(backend: str, step_of: StepOf, name: str, problem) -> Contender:
    loss = partial(ours_loss, backend, getattr(problem.case, "chunk_rows", None))
    return _torch(loss, "gft", step_of, name, problem)


def ours_loss(backend: str, chunk_rows: int | None, hidden_ND: Tensor, weight_VD: Tensor, problem) -> Tensor:
    """`gft_linear_loss` of a problem. Raises AbsentError where the backend cannot serve."""
    from gft_kernels import gft_linear_loss
    from gft_kernels.options import BackendUnavailable

    case = problem.case
    options = {"tau": case.tau, "temperature": case.temperature, "chunk_rows": chunk_rows}
    tensors = hidden_ND, weight_VD, problem.targets_N
    try:
        return gft_linear_loss(*tensors, advantages=problem.advantages_N, backend=backend, **options)
    except BackendUnavailable as reason:
        raise AbsentError(str(reason)) from reason


def eager_loss(hidden_ND: Tensor, weight_VD: Tensor, problem: LinearProblem) -> Tensor:
    """All logits at once, then the lean row loss: one fp32 log-softmax and one gather."""
    return gft_of_log_probs(log_probs_of_all_logits(hidden_ND, weight_VD, problem), problem)


def log_probs_of_all_logits(hidden_ND: Tensor, weight_VD: Tensor, problem: LinearProblem) -> Tensor:
    log_pi_NV = torch.log_softmax(_logits(hidden_ND, weight_VD, problem), dim=-1, dtype=torch.float32)
    return log_pi_NV.gather(1, problem.targets_N.clamp(min=0)[:, None])[:, 0]


def _logits(hidden_ND: Tensor, weight_VD: Tensor, problem: LinearProblem) -> Tensor:
    logits_NV = F.linear(hidden_ND, weight_VD)
    return logits_NV if problem.case.temperature == 1 else logits_NV / problem.case.temperature


def _linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, problem: LinearProblem, options=None) -> Tensor:
    if not hasattr(F, "linear_cross_entropy"):
        raise AbsentError(
            f"torch.nn.functional.linear_cross_entropy came with torch 2.13, and this is {torch.__version__}"
        )
    tempered_ND = linear_libraries.tempered(hidden_ND, problem)
    return F.linear_cross_entropy(tempered_ND, weight_VD, problem.targets_N, ignore_index=IGNORE_INDEX, options=options)


def _chunked_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, problem: LinearProblem) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions() if hasattr(torch.nn, "LinearCrossEntropyOptions") else None
    return _linear_cross_entropy(hidden_ND, weight_VD, problem, options)
