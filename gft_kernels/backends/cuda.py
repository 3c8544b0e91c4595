"""The CUDA backend: a cluster of thread blocks holds a row on chip, so the logits are read once and written once.

A call queues a few small launches for the rows' credit, one for loss and gradient, and one for the sum, on the current
stream. The kernels allocate nothing, wait for nothing and read nothing back: a call can be captured in a CUDA graph.
How a row travels: docs/kernels.md#cuda. Sizes: S, T, R, V as in options.py.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from gft_kernels import _extension
from gft_kernels.options import AgreedRows, RowCall, RowResult, ShardStatistics, gradient_for

MAX_VOCABULARY = (1 << 31) - 1024
"""Columns are counted in 32 bits, with room for a step past the end."""


def absent() -> str | None:
    """Why this machine has no use for the backend; None: ready."""
    return _lacks() or _extension.kernels().cuda.absent()


@cache
def _lacks() -> str | None:
    """What a process lacks for good; what a device says may be otherwise the next time."""
    if (reason := _extension.absent()) is not None:
        return reason
    if not _extension.has_cuda():
        return "the C++ kernels were built without CUDA; reinstall with GFT_BUILD=cuda (needs nvcc)"
    if torch.version.hip is not None:
        return "this PyTorch is built for AMD GPUs; the triton backend serves those"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA GPU"
    return _outdated_driver(**versions())


def versions() -> dict[str, int]:
    """The CUDA runtime linked in, and the newest that the driver here serves (0: no driver); 13000 is 13.0."""
    return _extension.kernels().cuda.versions()


def _outdated_driver(runtime: int, driver: int) -> str | None:
    """Why the driver cannot serve the runtime that is linked in; both as 13000 for CUDA 13.0, 0 for no driver."""
    if driver == 0 or driver // 1000 >= runtime // 1000:  # a driver serves every runtime of its own major version
        return None
    here, linked = (f"{version // 1000}.{version % 1000 // 10}" for version in (driver, runtime))
    return f"the C++ kernels were built with CUDA {linked}, and the driver serves CUDA {here}; update the driver, or " \
           f"reinstall with an nvcc of CUDA {here}"  # fmt: skip


def refuses(call: RowCall) -> str | None:
    """Why this call cannot be served; None: it can."""
    logits = call.logits_STV
    if logits.device.type != "cuda":
        return f"logits must be on a CUDA GPU, got {logits.device}"
    if logits.shape[-1] > MAX_VOCABULARY:
        return f"the vocabulary must be at most {MAX_VOCABULARY}, got {logits.shape[-1]}"
    if logits.numel() and logits.stride(-1) != 1 and logits.shape[-1] > 1:
        return f"logits must have stride 1 along the vocabulary, got {logits.stride(-1)}; pass logits.contiguous()"
    return _extension.misaligned(call) or _beyond_float32(call) or _extension.kernels().cuda.unfit(logits.device.index)


def _beyond_float32(call: RowCall) -> str | None:
    """Why the transform's constants would not be normal float32 numbers, which is what these kernels compute in."""
    sizes = {"logit_scale / temperature": call.logit_scale / call.temperature}
    if call.softcap:
        sizes |= {"softcap / temperature": call.softcap / call.temperature,
                  "logit_scale / softcap": call.logit_scale / call.softcap}  # fmt: skip
    for name, size in sizes.items():
        if not 1e-30 <= abs(size) <= 1e30:
            return f"{name} must lie within 1e-30 and 1e30 in size, got {size:g}"
    return None


def plan(call: RowCall) -> dict[str, object]:
    """How `run` launches the kernel that reads this call's logits.

    kernel; cluster: blocks that share a row; threads and shared_bytes of a block; resident: clusters that the device
    holds at once (0 for two_pass_row); grid: blocks; refused: what the device said to a larger plan, or None.
    """
    gradient = gradient_for(call.logits_STV, True, call.gradient_dtype) if call.want_gradient else None
    return _extension.kernels().cuda.plan_rows(
        _extension.logit_rows(call.logits_STV),
        gradient=None if gradient is None else _extension.logit_rows(gradient),
        entropy=call.needs_entropy,
        device=call.logits_STV.device.index,
    )


def run(call: RowCall, **shape: int) -> RowResult:
    """Loss, statistics and, if wanted, the gradient of a call; see `RowResult`.

    For tests, `shape` overrules the plan: cluster, the blocks that share a row, and clusters, how many at most at once.
    """
    cuda = _extension.kernels().cuda
    with torch.cuda.device(call.logits_STV.device.index):
        result = _extension.empty_result(call)
        native = _extension.native_call(call, result)
        workspace = torch.empty(cuda.workspace_bytes(native), dtype=torch.uint8, device=call.logits_STV.device)
        cuda.run_rows(native, workspace=_extension.address(workspace), **_place(call.logits_STV), **shape)
    return result


def scale(
    gradient_STV: Tensor,
    row_scale_R: Tensor | None,
    upstream: Tensor,
    inplace: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """As `_extension.scale`; upstream is read on the device only."""
    with torch.cuda.device(gradient_STV.device.index):
        native, where = _extension.kernels().cuda, _place(gradient_STV)
        return _extension.scale(native, gradient_STV, row_scale_R, upstream, inplace, dtype, **where)


def shard_statistics(call: RowCall, columns_R: Tensor, read_R: Tensor) -> ShardStatistics:
    with torch.cuda.device(call.logits_STV.device.index):
        native, where = _extension.kernels().cuda, _place(call.logits_STV)
        return _extension.shard_statistics(native, call, columns_R, read_R, torch.float32, **where)


def shard_gradient(call: RowCall, columns_R: Tensor, agreed: AgreedRows) -> Tensor:
    with torch.cuda.device(call.logits_STV.device.index):
        native, where = _extension.kernels().cuda, _place(call.logits_STV)
        return _extension.shard_gradient(native, call, columns_R, agreed, **where)


def _place(tensor: Tensor) -> dict[str, int]:
    """The device and PyTorch's current stream on it, by the call that Triton makes too: no object is made of it."""
    index = tensor.device.index
    return {"device": index, "stream": torch._C._cuda_getCurrentRawStream(index)}
