"""Contenders of the row benchmark. All have one signature: loss(logits_NV, problem) -> scalar loss with a gradient.

The logits reach each of them the way an output head would hand them over: as a non-leaf tensor whose gradient goes to
the layer below. That is what lets `inplace=True` reuse their storage, and it spares all of them a copy into `.grad`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks import gpu_peers, traffic
from benchmarks.harness import Absent, AbsentError, Contender, sentence
from benchmarks.row_losses import RowLoss, cross_entropy, lean_loss, paper_loss, step_of
from benchmarks.row_problem import RowProblem

FLOOR = "floor: logits.mul_(c)"
BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")


def row_contenders(problem: RowProblem, only: str = "") -> list[Contender | Absent]:
    """Everyone who can be asked on this problem; `only` keeps the floor and the names that contain it.

    backend="auto" is another entry's twin, so it comes only when it is asked for.
    """
    makers = _makers()
    names = [name for name in makers if "auto" not in name or "auto" in only]
    return [makers[name](name, problem) for name in names if name == FLOOR or only in name]


def row_contender(problem: RowProblem, name: str) -> Contender | Absent:
    """The one of that name."""
    return _makers()[name](name, problem)


def _makers() -> dict[str, Callable[[str, RowProblem], Contender | Absent]]:
    """How each contender is made. Nothing is imported before it is: optional packages are slow to load."""
    liger = partial(_kernels, "liger_kernel.transformers.functional", gpu_peers.liger_cross_entropy)
    quack = partial(_kernels, "quack.cross_entropy", gpu_peers.quack_cross_entropy)
    trl = partial(_kernels, "trl.kernels.logprob_entropy", gpu_peers.trl_loss)
    makers = {FLOOR: floor}
    ours = [(backend, inplace) for backend in BACKENDS for inplace in (True, False)]
    ours.remove(("reference", True))  # plain torch, where in place only adds a copy
    makers |= {ours_name(backend, inplace): partial(_ours, backend, inplace) for backend, inplace in ours}
    makers |= {
        "eager PyTorch, paper's formulation": partial(_torch, paper_loss, "gft", traffic.PAPER),
        "eager PyTorch, lean": partial(_torch, lean_loss, "gft", None),
        "torch.compile of lean": partial(_compiled, lean_loss, "gft"),
        "F.cross_entropy": partial(_torch, cross_entropy, "cross-entropy", None),
        "Liger cross-entropy": partial(liger, "cross-entropy", traffic.TWO_PASS),
        "quack cross-entropy": partial(quack, "cross-entropy", traffic.FLOOR),
        "TRL log-probabilities + 3 lines": partial(trl, "gft", traffic.TWO_PASS),
        "Liger GRPO": gpu_peers.liger_grpo,
    }
    return makers


def floor(name: str, problem: RowProblem) -> Contender:
    """Reading and writing the logits once, in place: what no loss with a gradient can beat."""
    factor = torch.tensor(1.0009765625, dtype=problem.logits_NV.dtype, device=problem.logits_NV.device)

    def step() -> None:
        problem.logits_NV.mul_(factor)

    return Contender(name, step, None, traffic.FLOOR)


def _torch(loss: RowLoss, objective: str, passes: traffic.Passes | None, name: str, problem: RowProblem) -> Contender:
    return Contender(name, step_of(loss, problem), objective, passes)


def _kernels(
    module: str, loss: RowLoss, objective: str, passes: traffic.Passes, name: str, problem: RowProblem
) -> Contender | Absent:
    """A peer made of GPU kernels."""
    absent = gpu_peers.absent_peer(name, module, problem.case.device)
    return absent or Contender(name, step_of(loss, problem), objective, passes)


def ours_name(backend: str, inplace: bool) -> str:
    return f"gft_loss {backend}{', in place' if inplace else ''}"


def ours_loss(backend: str, inplace: bool, logits_NV: Tensor, problem, **options) -> Tensor:
    """`gft_loss` of a problem. Raises AbsentError where the backend cannot serve."""
    from gft_kernels import gft_loss
    from gft_kernels.options import BackendUnavailable

    try:
        return gft_loss(logits_NV, problem.targets_N, advantages=problem.advantages_N, tau=problem.case.tau,
                        temperature=problem.case.temperature, inplace=inplace, backend=backend, **options)  # fmt: skip
    except BackendUnavailable as reason:
        raise AbsentError(str(reason)) from reason


def _ours(backend: str, inplace: bool, name: str, problem: RowProblem) -> Contender:
    # the reference backend is plain torch: its traffic is whatever torch makes of it
    passes = None if backend == "reference" else traffic.FLOOR
    return Contender(name, step_of(partial(ours_loss, backend, inplace), problem), "gft", passes)


def _compiled(loss: RowLoss, objective: str, name: str, problem: RowProblem) -> Contender:
    return Contender(name, step_of(compile_or_absent(loss), problem), objective)


def compile_or_absent(loss: Callable) -> Callable:
    """torch.compile of a loss; the first call compiles, and a machine without a toolchain says so there."""
    torch._dynamo.reset()  # at its eighth shape of one function dynamo would give up and run it eagerly, without a word
    compiled = torch.compile(loss, dynamic=False)

    def guarded(*arguments) -> Tensor:
        try:
            return compiled(*arguments)
        except Exception as error:
            if "inductor" not in f"{type(error).__module__} {error}".lower():
                raise
            raise AbsentError(f"inductor cannot compile here: {sentence(error)}") from error

    return guarded
