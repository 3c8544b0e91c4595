"""The CPU backend: C++ kernels that read a row twice, its second pass from cache, and hold nothing beside it.

Sizes: S responses, T positions, R = S·T rows, V vocabulary (here perhaps a shard of it).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gft_kernels import _extension
from gft_kernels.options import AgreedRows, RowCall, RowResult, ShardStatistics, gradient_for

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
    if logits.numel() and logits.shape[-1] > 1 and logits.stride(-1) != 1:
        return f"logits have stride {logits.stride(-1)} over the vocabulary, and these kernels need 1"
    return _extension.misaligned(call)


def run(call: RowCall, instruction_set: str = FASTEST) -> RowResult:
    """Loss, statistics and, if wanted, the gradient of a call; see `RowResult`."""
    result = _extension.empty_result(call)
    _extension.kernels().row_loss(_extension.native_call(call, result), **_execution(instruction_set))
    return result


def scale(
    gradient_STV: Tensor, row_scale_R: Tensor | None, upstream: Tensor, inplace: bool, instruction_set: str = FASTEST
) -> Tensor:
    """gradient·row_scale·upstream, one product in float32 and one rounding; upstream is () or (R,)."""
    out = gradient_for(gradient_STV, inplace)
    upstream = upstream.to(torch.float32).contiguous()
    _extension.kernels().scale_rows(
        gradient=_extension.logit_rows(gradient_STV),
        out=_extension.logit_rows(out),
        row_scale_R=_extension.address(row_scale_R),
        upstream=_extension.address(upstream),
        upstream_per_row=upstream.dim() > 0,
        **_execution(instruction_set),
    )
    return out


def shard_statistics(
    call: RowCall, columns_R: Tensor, read_R: Tensor, instruction_set: str = FASTEST
) -> ShardStatistics:
    """F1 over a vocabulary shard, in float64; see `ShardStatistics`.

    columns_R: (R,) int64, the target's column in this shard, or anything outside [0, V) if it lies in another.
    read_R: (R,) bool; rows it leaves out are not read and give the neutral state (-inf, 0).
    """
    statistics, addresses = _extension.shard_results(call, columns_R.numel(), torch.float64)
    _extension.kernels().shard_statistics(
        _extension.shard(call, columns_R), read_R=_extension.address(read_R), **addresses, **_execution(instruction_set)
    )
    return statistics


def shard_gradient(call: RowCall, columns_R: Tensor, agreed: AgreedRows, instruction_set: str = FASTEST) -> Tensor:
    """F7 over a vocabulary shard, from what is known of the whole rows.

    A row whose scale and tilt are 0 is not read; its gradient is exactly 0.
    """
    out = gradient_for(call.logits_STV.detach(), call.inplace)
    _extension.kernels().shard_gradient(
        _extension.shard(call, columns_R),
        agreed=_extension.agreed_rows(call, agreed),
        out=_extension.logit_rows(out),
        **_execution(instruction_set),
    )
    return out


def _execution(instruction_set: str) -> dict[str, Any]:
    return {"instruction_set": instruction_set, "threads": torch.get_num_threads()}
