"""The loss over a vocabulary that is sharded across ranks: two small reductions per block of rows, gradients local.

Rank i of the group holds columns [offset_i, offset_i + V_i) of every row, in rank order; widths may differ and may be
0. Rows, targets, rewards and masks are the same on all ranks. Each rank folds its columns into a state (top, mass)
without the target (F1); a maximum over the ranks aligns the tops, and one sum of four numbers a row brings the whole
row's state, the target's logit and what entropy needs (F2). From there on every rank knows log pi (F3), kappa and its
own columns' gradient (F7).

Sizes: S, T, R as in options.py; V the width of this rank's shard; W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gft_kernels import formulas
from gft_kernels.advantages import credit_rows, rows_read
from gft_kernels.backends import reference
from gft_kernels.options import AgreedRows, RowCall, RowResult, gradient_for


class Shard(NamedTuple):
    """Where this rank's columns lie; on the logits' device, so that nothing waits for a GPU."""

    widths_W: Tensor  # int64
    offset: Tensor  # () int64

    @property
    def vocabulary(self) -> Tensor:
        """() int64: the size of the whole one."""
        return self.widths_W.sum()


def group_of(name: str) -> dist.ProcessGroup:
    """The process group an operator was given by name."""
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def meet(name: str, width: int, device: torch.device) -> Shard | None:
    """Tell every rank how wide each shard is: one small exchange per call. None where no group is named."""
    if not name:
        return None
    group = group_of(name)
    widths_W = torch.zeros(group.size(), dtype=torch.int64, device=device)
    widths_W[group.rank()] = width
    dist.all_reduce(widths_W, op=dist.ReduceOp.SUM, group=group)
    return Shard(widths_W, widths_W[: group.rank()].sum())


def sum_over_ranks(name: str, values: Tensor) -> None:
    """Add up a tensor over the ranks, in place."""
    dist.all_reduce(values, op=dist.ReduceOp.SUM, group=group_of(name))


class WholeRow(NamedTuple):
    """What the ranks agree on about each row; float64 (R,)."""

    log_pi_R: Tensor
    top_R: Tensor
    log_mass_R: Tensor
    entropy_R: Tensor


def merge_shards(
    name: str, top_R: Tensor, mass_R: Tensor, gap_R: Tensor, target_R: Tensor, found_R: Tensor
) -> WholeRow:
    """F2 over the ranks, then F3: a maximum, and one sum of four numbers a row (float64: exact beside float32 states).

    The states leave the target out. found_R: 1 where this rank holds the target; a row nobody holds gets NaN.
    """
    shared_R = top_R.clone()
    dist.all_reduce(shared_R, op=dist.ReduceOp.MAX, group=group_of(name))
    drop_R = top_R - torch.where(shared_R == formulas.NEG_INF, 0.0, shared_R)
    packed_4R = torch.stack([mass_R * torch.exp(drop_R), formulas.raise_gap(gap_R, mass_R, drop_R), target_R, found_R])
    sum_over_ranks(name, packed_4R)
    mass_R, gap_R, target_R, found_R = packed_4R
    log_pi_R = torch.where(found_R == 1, formulas.log_prob(target_R, shared_R, mass_R), float("nan"))
    top_R, whole_R = formulas.observe(shared_R, mass_R, target_R)
    gap_R = formulas.raise_gap(gap_R, mass_R, shared_R - top_R) + formulas.raise_gap(0.0, 1.0, target_R - top_R)
    log_mass_R = torch.log(whole_R)
    return WholeRow(log_pi_R, top_R, log_mass_R, formulas.entropy(log_mass_R, gap_R / whole_R))


@dataclass(frozen=True)
class VocabularyParallel:
    """A backend that serves this rank's shard and meets the other ranks in between."""

    module: ModuleType
    shard: Shard

    def run(self, call: RowCall) -> RowResult:
        """Loss, statistics and this shard's gradient; every rank returns the same loss. See `RowResult`."""
        credit = credit_rows(call.credit)
        read_R = rows_read(credit, call.objective, call.reads_every_live_row)
        columns_R = call.credit.targets_R - self.shard.offset
        row = self._observe(call, columns_R, read_R)
        log_pi_R = torch.where(read_R, row.log_pi_R, 0.0).float()
        entropy_R = torch.where(read_R, row.entropy_R, 0.0).float()
        terms = reference.row_terms(call.objective, log_pi_R, credit.advantages_R, entropy_R)
        loss_R = torch.where(read_R, formulas.weighed(credit.weights_R, terms.loss), 0.0).float()
        scales, unit_R = reference.row_scales(call, credit.weights_R, terms.kappa, entropy_R, read_R)
        return RowResult(
            loss=loss_R if call.credit.reduction == "none" else loss_R.double().sum().float(),
            log_probs_R=log_pi_R,
            coefficients_R=torch.where(read_R, terms.coefficient, 0.0).float(),
            advantages_R=credit.advantages_R,
            gradient_STV=self._gradient(call, columns_R, row, log_pi_R, scales) if call.want_gradient else None,
            row_scale_R=unit_R if call.defer_scale else None,
            entropy_R=entropy_R if call.want_entropy else None,
        )

    def _observe(self, call: RowCall, columns_R: Tensor, read_R: Tensor) -> WholeRow:
        """This shard's statistics, merged with the other ranks'. An empty shard brings the neutral state."""
        width, rows = call.logits_STV.shape[-1], columns_R.numel()
        state_4R = torch.zeros(4, rows, dtype=torch.float64, device=columns_R.device)
        state_4R[0] = formulas.NEG_INF
        if width and rows:
            for mine, found in zip(state_4R, self.module.shard_statistics(call, columns_R, read_R), strict=True):
                if found is not None:
                    mine.copy_(found)
        found_R = read_R & (columns_R >= 0) & (columns_R < width)
        top_R, mass_R, gap_R, target_R = state_4R
        return merge_shards(call.process_group, top_R, mass_R, gap_R, target_R, found_R.double())

    def _gradient(
        self, call: RowCall, columns_R: Tensor, row: WholeRow, log_pi_R: Tensor, scales: reference.RowScales
    ) -> Tensor:
        """This shard's gradient."""
        if not call.logits_STV.numel():
            return gradient_for(call.logits_STV.detach(), call.inplace, call.gradient_dtype)
        agreed = AgreedRows(*(x.float() for x in (log_pi_R, row.top_R, row.log_mass_R, *scales)))
        return self.module.shard_gradient(call, columns_R, agreed)
