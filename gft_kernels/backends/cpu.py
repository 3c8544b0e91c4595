"""The CPU backend: C++ kernels that read a row twice, its second pass from cache, and hold nothing beside it.

Sizes: S responses, T positions, R = S·T rows, V vocabulary (here perhaps a shard of it).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gft_kernels import _extension
from gft_kernels.options import AgreedRows, RowCall, RowResult

FASTEST = ""
"""The instruction set the processor runs fastest; tests name another of `_C.instruction_sets()`."""


def absent() -> str | None:
    """Why this backend cannot run on this machine."""
    return _extension.absent()


def refuses(call: RowCall) -> str | None:
    """Why this backend cannot serve a call."""
    logits = call.logits_STV
    if logits.device.type != "cpu":
        return f"logits are on {logits.device}, and these kernels read the memory of the CPU"
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        return f"logits have stride {logits.stride(-1)} over the vocabulary, and these kernels need 1"
    return None


def run(call: RowCall, instruction_set: str = FASTEST) -> RowResult:
    """Loss, statistics and, if wanted, the gradient of a call; see `RowResult`. Raises ValueError for a bad index."""
    result = _extension.empty_result(call)
    fault = _extension.kernels().row_loss(
        _extension.native_call(call, result), instruction_set=instruction_set, threads=torch.get_num_threads()
    )
    if fault is not None:
        name, position, value, stop = fault
        raise ValueError(
            f"{name} must lie in [0, {stop}) or the row be masked (ignore_index={call.credit.ignore_index}), "
            f"got {value} at position {position}; mask rows that do not count"
        )
    return result


def scale(
    gradient_STV: Tensor, row_scale_R: Tensor | None, upstream: Tensor, inplace: bool, instruction_set: str = FASTEST
) -> Tensor:
    """gradient·row_scale·upstream, one product in float32 and one rounding; upstream is () or (R,)."""
    out = _gradient_for(gradient_STV, inplace)
    upstream = upstream.to(torch.float32).contiguous()
    _extension.kernels().scale_rows(
        gradient=_extension.logit_rows(gradient_STV),
        out=_extension.logit_rows(out),
        row_scale_R=_extension.address(row_scale_R),
        upstream=_extension.address(upstream),
        upstream_per_row=upstream.dim() > 0,
        instruction_set=instruction_set,
        threads=torch.get_num_threads(),
    )
    return out


class ShardStatistics(NamedTuple):
    """A vocabulary shard's part of each row; float64 (R,), in nats. The state leaves the target out, as F3 wants it."""

    top_R: Tensor  # at most 50 below the shard's largest logit
    mass_R: Tensor  # sum of e^(z - top)
    gap_R: Tensor | None  # sum of e^(z - top)·(z - top), for the entropy
    target_logit_R: Tensor  # transformed; 0 where the target lies in another shard


def shard_statistics(
    call: RowCall, columns_R: Tensor, read_R: Tensor, instruction_set: str = FASTEST
) -> ShardStatistics:
    """F1 over a vocabulary shard; see `ShardStatistics`.

    columns_R: (R,) int64, the target's column in this shard, or anything outside [0, V) if it lies in another.
    read_R: (R,) bool; rows it leaves out are not read and give the neutral state (-inf, 0).
    """
    logits = call.logits_STV.detach()
    top_R, mass_R, gap_R, target_logit_R = torch.empty(4, columns_R.numel(), dtype=torch.float64)
    _extension.kernels().shard_statistics(
        logits=_extension.logit_rows(logits),
        columns_R=_extension.address(columns_R),
        read_R=_extension.address(read_R),
        transform=_extension.transform(call.logit_scale, call.softcap, call.temperature),
        top_R=_extension.address(top_R),
        mass_R=_extension.address(mass_R),
        gap_R=_extension.address(gap_R if call.needs_entropy else None),
        target_logit_R=_extension.address(target_logit_R),
        instruction_set=instruction_set,
        threads=torch.get_num_threads(),
    )
    return ShardStatistics(top_R, mass_R, gap_R if call.needs_entropy else None, target_logit_R)


def shard_gradient(call: RowCall, columns_R: Tensor, agreed: AgreedRows, instruction_set: str = FASTEST) -> Tensor:
    """F7 over a vocabulary shard, from what is known of the whole rows.

    A row whose scale and tilt are 0 is not read; its gradient is exactly 0.
    """
    logits = call.logits_STV.detach()
    out = _gradient_for(logits, call.inplace)
    _extension.kernels().shard_gradient(
        logits=_extension.logit_rows(logits),
        out=_extension.logit_rows(out),
        columns_R=_extension.address(columns_R),
        log_pi_R=_extension.address(agreed.log_pi_R),
        top_R=_extension.address(agreed.top_R),
        log_mass_R=_extension.address(agreed.log_mass_R),
        scale_R=_extension.address(agreed.scale_R),
        tilt_R=_extension.address(agreed.tilt_R),
        entropy_R=_extension.address(agreed.entropy_R),
        transform=_extension.transform(call.logit_scale, call.softcap, call.temperature),
        instruction_set=instruction_set,
        threads=torch.get_num_threads(),
    )
    return out


def _gradient_for(logits: Tensor, inplace: bool) -> Tensor:
    return logits if inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
