"""The CPU backend: C++ kernels that read a row twice, its second pass from cache, and hold nothing beside it.

Sizes: S responses, T positions, R = S·T rows, V vocabulary (here perhaps a shard of it).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gft_kernels import _extension
from gft_kernels.options import AgreedRows, RowCall, RowResult, ShardStatistics

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
    if call.gradient_dtype not in (None, logits.dtype):
        return f"the gradient is to be {call.gradient_dtype}, and these kernels write the logits' {logits.dtype}"
    return _extension.misaligned(call)


def run(call: RowCall, instruction_set: str = FASTEST) -> RowResult:
    """Loss, statistics and, if wanted, the gradient of a call; see `RowResult`."""
    result = _extension.empty_result(call)
    _extension.kernels().row_loss(_extension.native_call(call, result), **_execution(instruction_set))
    return result


def scale(
    gradient_STV: Tensor,
    row_scale_R: Tensor | None,
    upstream: Tensor,
    inplace: bool,
    dtype: torch.dtype | None = None,
    instruction_set: str = FASTEST,
) -> Tensor:
    where = _execution(instruction_set)
    return _extension.scale(_extension.kernels(), gradient_STV, row_scale_R, upstream, inplace, dtype, **where)


def shard_statistics(
    call: RowCall, columns_R: Tensor, read_R: Tensor, instruction_set: str = FASTEST
) -> ShardStatistics:
    where = _execution(instruction_set)
    return _extension.shard_statistics(_extension.kernels(), call, columns_R, read_R, torch.float64, **where)


def shard_gradient(call: RowCall, columns_R: Tensor, agreed: AgreedRows, instruction_set: str = FASTEST) -> Tensor:
    return _extension.shard_gradient(_extension.kernels(), call, columns_R, agreed, **_execution(instruction_set))


def _execution(instruction_set: str) -> dict[str, Any]:
    return {"instruction_set": instruction_set, "threads": torch.get_num_threads()}
