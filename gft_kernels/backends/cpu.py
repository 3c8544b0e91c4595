"""The CPU backend: C++ kernels that read a row twice, its second pass from cache, and hold nothing beside it.

Sizes: S responses, T positions, R = S·T rows, V vocabulary (here perhaps a shard of it).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gft_kernels import _extension
from gft_kernels.options import RowCall, RowResult

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
    out = gradient_STV if inplace else torch.empty_like(gradient_STV, memory_format=torch.contiguous_format)
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


@dataclass(frozen=True)
class ShardStatistics:
    """A vocabulary shard's part of each row's softmax, in nats of the transformed logits; float64 of shape (R,).

    Merge shards with F2. A row that was not read holds the neutral element.
    """

    top_R: Tensor  # a reference, at most 50 below the shard's largest logit
    mass_R: Tensor  # sum of e^(z - top)
    gap_R: Tensor | None  # sum of (z - top)·e^(z - top), for the entropy
    target_logit_R: Tensor  # -inf where the target lies in another shard


def shard_statistics(
    call: RowCall, targets_R: Tensor, live_R: Tensor | None, instruction_set: str = FASTEST
) -> ShardStatistics:
    """F1 over the columns at hand.

    `targets_R` (int64, contiguous) counts from the shard's first column; `live_R` (bool) spares the other rows.
    """
    rows = targets_R.numel()
    top_R, mass_R, target_logit_R = (torch.empty(rows, dtype=torch.float64) for _ in range(3))
    gap_R = torch.empty(rows, dtype=torch.float64) if call.want_entropy else None
    _extension.kernels().row_statistics(
        logits=_extension.logit_rows(call.logits_STV),
        targets_R=_extension.address(targets_R),
        live_R=_extension.address(live_R),
        transform=_extension.transform(call.logit_scale, call.softcap, call.temperature),
        top_R=_extension.address(top_R),
        mass_R=_extension.address(mass_R),
        gap_R=_extension.address(gap_R),
        target_logit_R=_extension.address(target_logit_R),
        instruction_set=instruction_set,
        threads=torch.get_num_threads(),
    )
    return ShardStatistics(top_R, mass_R, gap_R, target_logit_R)


def shard_gradient(
    call: RowCall,
    targets_R: Tensor,
    top_R: Tensor,
    mass_R: Tensor,
    log_probs_R: Tensor,
    scale_R: Tensor,
    instruction_set: str = FASTEST,
) -> Tensor:
    """F7 over the columns at hand, given each row's softmax (top, mass) and log pi over the whole vocabulary (float64).

    `scale_R` (float32) is weight·kappa; a row of scale 0 is not read, and its gradient is exactly 0.
    """
    logits = call.logits_STV.detach()
    out = logits if call.inplace else torch.empty(logits.shape, dtype=logits.dtype)
    _extension.kernels().row_gradient(
        logits=_extension.logit_rows(logits),
        out=_extension.logit_rows(out),
        targets_R=_extension.address(targets_R),
        top_R=_extension.address(top_R),
        mass_R=_extension.address(mass_R),
        log_probs_R=_extension.address(log_probs_R),
        scale_R=_extension.address(scale_R),
        transform=_extension.transform(call.logit_scale, call.softcap, call.temperature),
        instruction_set=instruction_set,
        threads=torch.get_num_threads(),
    )
    return out
