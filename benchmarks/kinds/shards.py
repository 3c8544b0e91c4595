"""Loss and gradient over logits sharded over the vocabulary: a case over several ranks, one process each.

Every rank holds the columns of its own slice; targets, advantages and the loss are the same everywhere. Every rank
checks and times the same contenders in the same order, and all are told the same times, so that they agree on who has
used up its budget.
"""

from __future__ import annotations

import pickle
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, multiprocessing

from benchmarks.clocks import Clock, clock_for
from benchmarks.harness import Answer, Deviation, Outcome, Step, measure
from benchmarks.kinds import row
from benchmarks.kinds.inputs import IGNORE_INDEX, gft_of_log_probs
from benchmarks.kinds.kind import BACKENDS, DTYPES, Kind, Peer
from benchmarks.kinds.row import RowCase, RowProblem


@dataclass(frozen=True)
class ShardCase(RowCase):
    """One measurement of the loss over logits sharded over the vocabulary; `threads` are each rank's."""

    ranks: int = 2

    def label(self) -> str:
        return f"{super().label()}, {self.ranks} ranks"


def cases(device: str, *, quick: bool = False, threads: int = 1) -> list[ShardCase]:
    """The headline vocabulary over two ranks, each with `threads` threads."""
    rows = 32 if quick else row.HEADLINE_ROWS[device]
    head = ShardCase(rows, row.HEADLINE_VOCABULARY, device=device, threads=threads)
    return [head] if quick else [replace(head, dtype=dtype) for dtype in DTYPES]


@dataclass(frozen=True, kw_only=True)
class ShardProblem(RowProblem):
    """This rank's columns [first, first + width) of all rows. `whole` is what they were cut from."""

    whole: RowProblem
    first: int

    def deviation(self, answer: Answer, objective: str) -> Deviation:
        """Of the gradient put together from all ranks: the same number on each of them."""
        (mine_NV,) = answer.gradients
        gradient_NV = torch.cat(gather(mine_NV.reshape(self.logits_NV.shape).contiguous()), dim=1)
        return self.whole.deviation(Answer(answer.loss, (gradient_NV,)), objective)


def build(case: ShardCase) -> ShardProblem:
    """Equal widths; vocabularies are multiples of the number of ranks here."""
    assert dist.get_world_size() == case.ranks and case.vocab % case.ranks == 0, case
    whole = row.build(case)
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


# Contenders.


def _ours(backend: str, inplace: bool, logits_NV: Tensor, problem: ShardProblem) -> Tensor:
    return row.ours(backend, inplace, logits_NV, problem, process_group=dist.group.WORLD)


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
    log_pi_N = _ShardedLogProbs.apply(logits_NV / problem.case.temperature, targets_N, problem.first)
    return gft_of_log_probs(log_pi_N, problem)


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
    return row.lean_loss(_Gathered.apply(logits_NV, problem.first), problem)


def _loss_parallel(problem: ShardProblem) -> Step:
    """PyTorch's own: cross-entropy of a DTensor sharded over its last dimension."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.parallel import loss_parallel

    mesh = init_device_mesh(problem.case.device, (problem.case.ranks,))

    def loss(logits_NV: Tensor, problem: ShardProblem) -> Tensor:
        spread_NV = DTensor.from_local(logits_NV / problem.case.temperature, mesh, [Shard(1)])
        return F.cross_entropy(spread_NV, problem.targets_N, ignore_index=IGNORE_INDEX).to_local()

    return row.step_of(loss, problem, around=loss_parallel)


PEERS = {
    row.FLOOR: row.PEERS[row.FLOOR],
    **row.ours_by_name(*BACKENDS, loss=_ours),
    "eager PyTorch, Megatron's way": Peer(_sharded_loss),
    "eager PyTorch, logits gathered": Peer(_gathered_loss),
    "torch loss_parallel": Peer(step=_loss_parallel, objective="cross-entropy"),
}


# Ranks.

LIMIT_S = 600
"""After this a run over ranks is ended: one of them waits for another that will not come."""


class Lockstep(Clock):
    """A clock all ranks share: they start a step together, and the slowest one's time is everyone's."""

    def __init__(self, device: str, *, cold: bool):
        self._clock, self._device = clock_for(device, cold=cold, meet=dist.barrier), device

    def time(self, step: Step) -> float:
        slowest = torch.tensor(self._clock.time(step), dtype=torch.float64, device=self._device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return slowest.item()


def measure_in_ranks(case: ShardCase, **options) -> list[Outcome]:
    """`harness.measure` of a case with `case.ranks` processes. Ranks that fail are one outcome that says why."""
    deadline = time.monotonic() + LIMIT_S
    with tempfile.TemporaryDirectory() as folder:
        ranks = multiprocessing.spawn(main, (case, Path(folder), options), case.ranks, join=False)
        try:
            while not ranks.join(timeout=max(0.0, deadline - time.monotonic())):
                if time.monotonic() > deadline:
                    return [Outcome("all", "failed", why=f"the ranks did not finish within {LIMIT_S} s")]
        except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException) as error:
            return [Outcome("all", "failed", why=str(error).strip().splitlines()[-1][:200])]
        finally:
            for process in ranks.processes:
                process.kill()
        return pickle.loads(Path(folder, "outcomes").read_bytes())


KIND = Kind("loss and gradient over logits sharded over the vocabulary", ShardCase, cases, build, PEERS, row.step_of,
            lambda case: row.logits_bytes(case) // case.ranks, measure=measure_in_ranks)  # fmt: skip


def main(rank: int, case: ShardCase, folder: Path, options: dict[str, Any]) -> None:
    backend = "gloo" if case.device == "cpu" else "nccl"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=case.ranks,
                            timeout=timedelta(seconds=120))  # fmt: skip
    if case.device == "cpu":
        torch.set_num_threads(case.threads)
    else:
        torch.cuda.set_device(rank)
    problem = build(case)
    clock = Lockstep(case.device, cold=options.pop("cold"))
    contenders = KIND.invite(problem, options.pop("only"), options.pop("skip"))
    outcomes = measure(problem, contenders, clock, **options)
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        (folder / "outcomes").write_bytes(pickle.dumps(outcomes))
