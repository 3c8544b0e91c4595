"""The loss over logits sharded over the vocabulary: each rank's inputs, the check, the contenders.

Runs inside a rank (ranks.py), where torch.distributed is up. Every rank holds the columns of its own slice; targets,
advantages and the loss are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Absent, Answer, Contender, Deviation
from benchmarks.peers import BACKENDS, FLOOR, floor, ours_loss, ours_name
from benchmarks.row_losses import gft_of_log_probs, lean_loss, step_of
from benchmarks.row_problem import IGNORE_INDEX, RowProblem, build_row_problem
from benchmarks.shapes import ShardCase


@dataclass(frozen=True)
class ShardProblem(RowProblem):
    """This rank's columns [first, first + width) of all rows. `whole` is what they were cut from."""

    whole: RowProblem
    first: int

    def deviation(self, answer: Answer, objective: str) -> Deviation:
        """Of the gradient put together from all ranks: the same number on each of them."""
        (mine_NV,) = answer.gradients
        gradient_NV = torch.cat(gather(mine_NV.reshape(self.logits_NV.shape).contiguous()), dim=1)
        return self.whole.deviation(Answer(answer.loss, (gradient_NV,)), objective)


def build_shard_problem(case: ShardCase) -> ShardProblem:
    """Equal widths; vocabularies are multiples of the number of ranks here."""
    assert dist.get_world_size() == case.ranks and case.vocab % case.ranks == 0, case
    whole = build_row_problem(case)
    width = case.vocab // case.ranks
    first = dist.get_rank() * width
    mine_NV = whole.pristine_NV[:, first : first + width].contiguous()
    parts = vars(replace(whole, logits_NV=mine_NV.clone(), pristine_NV=mine_NV))
    return ShardProblem(**parts, whole=whole, first=first)


def gather(mine: Tensor) -> list[Tensor]:
    """Everyone's tensor of this shape, in rank order."""
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return everyone


def shard_contenders(problem: ShardProblem, only: str = "") -> list[Contender | Absent]:
    """Everyone who can be asked on this problem."""
    return [make(name, problem) for name, make in _makers().items() if name == FLOOR or only in name]


def shard_contender(problem: ShardProblem, name: str) -> Contender | Absent:
    return _makers()[name](name, problem)


def _makers() -> dict[str, Callable[[str, ShardProblem], Contender | Absent]]:
    ours = [(backend, inplace) for backend in BACKENDS if backend != "auto" for inplace in (True, False)]
    ours.remove(("reference", True))  # as in the row benchmark
    group = {"process_group": dist.group.WORLD}
    return {
        FLOOR: floor,
        **{ours_name(backend, inplace): partial(_plain, partial(ours_loss, backend, inplace, **group), "gft")
           for backend, inplace in ours},
        "eager PyTorch, Megatron's way": partial(_plain, _sharded_loss, "gft"),
        "eager PyTorch, logits gathered": partial(_plain, _gathered_loss, "gft"),
        "torch loss_parallel": _loss_parallel,
    }  # fmt: skip


def _plain(loss: Callable[[Tensor, Any], Tensor], objective: str, name: str, problem: ShardProblem) -> Contender:
    return Contender(name, step_of(loss, problem), objective)


class _ShardedLogProbs(torch.autograd.Function):
    """log π of the targets as Megatron computes its cross-entropy: three reductions, the softmax kept for backward."""

    @staticmethod
    def forward(ctx, logits_NV: Tensor, targets_N: Tensor, first: int) -> Tensor:
        z_NV = logits_NV.float()
        top_N = z_NV.max(1).values
        dist.all_reduce(top_N, op=dist.ReduceOp.MAX)
        z_NV = z_NV - top_N[:, None]
        column_N = targets_N - first
        here_N = (column_N >= 0) & (column_N < z_NV.shape[1])
        column_N1 = column_N.where(here_N, 0)[:, None]
        target_N = z_NV.gather(1, column_N1)[:, 0].where(here_N, 0.0)
        dist.all_reduce(target_N)
        pi_NV = z_NV.exp_()
        mass_N = pi_NV.sum(1)
        dist.all_reduce(mass_N)
        ctx.save_for_backward(pi_NV.div_(mass_N[:, None]), column_N1, here_N)
        ctx.dtype = logits_NV.dtype
        return target_N - mass_N.log()

    @staticmethod
    def backward(ctx, upstream_N: Tensor):
        pi_NV, column_N1, here_N = ctx.saved_tensors
        gradient_NV = pi_NV.mul_(-upstream_N[:, None])
        gradient_NV.scatter_add_(1, column_N1, upstream_N.where(here_N, 0.0)[:, None])
        return gradient_NV.to(ctx.dtype), None, None


def _sharded_loss(logits_NV: Tensor, problem: ShardProblem) -> Tensor:
    targets_N = problem.targets_N.clamp(min=0)
    return gft_of_log_probs(
        _ShardedLogProbs.apply(logits_NV / problem.case.temperature, targets_N, problem.first), problem
    )


class _Gathered(torch.autograd.Function):
    """All columns on every rank. Each rank computes the whole loss, so its own columns' gradient is complete."""

    @staticmethod
    def forward(ctx, logits_NV: Tensor, first: int) -> Tensor:
        ctx.columns = slice(first, first + logits_NV.shape[1])
        return torch.cat(gather(logits_NV.contiguous()), dim=1)

    @staticmethod
    def backward(ctx, gradient_NV: Tensor):
        return gradient_NV[:, ctx.columns], None


def _gathered_loss(logits_NV: Tensor, problem: ShardProblem) -> Tensor:
    return lean_loss(_Gathered.apply(logits_NV, problem.first), problem)


def _loss_parallel(name: str, problem: ShardProblem) -> Contender:
    """PyTorch's own: cross-entropy of a DTensor sharded over its last dimension."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.parallel import loss_parallel

    mesh = init_device_mesh(problem.case.device, (problem.case.ranks,))

    def loss(logits_NV: Tensor, problem: ShardProblem) -> Tensor:
        spread_NV = DTensor.from_local(logits_NV / problem.case.temperature, mesh, [Shard(1)])
        return F.cross_entropy(spread_NV, problem.targets_N, ignore_index=IGNORE_INDEX).to_local()

    return Contender(name, step_of(loss, problem, around=loss_parallel), "cross-entropy")
