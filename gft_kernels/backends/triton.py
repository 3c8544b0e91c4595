"""The Triton backend: NVIDIA and AMD GPUs, or the CPU through Triton's interpreter (TRITON_INTERPRET=1, for tests).

A call is torch's few small operators for the rows' credit (advantages.py), one launch for loss and gradient, and the
sum. Nothing is read back by the host. Sizes: S, T, R, V as in options.py.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from gft_kernels.advantages import credit_rows
from gft_kernels.options import (
    FP16_PEAK,
    RECTIFY,
    RULE_FIELDS,
    SURROGATES,
    AgreedRows,
    Objective,
    RowCall,
    RowResult,
    ShardStatistics,
    gradient_for,
    rule_values,
)

MAX_VOCABULARY = 1 << 30  # columns are counted in 32 bits, with room for one tile more
MIN_CAPABILITY = (8, 0)
MIN_TRITON = (3, 3)  # earlier ones know no tuples inside kernels


@cache
def absent() -> str | None:
    """Why this machine has no use for the backend; None: ready."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:  # before the slow import
        return "PyTorch sees no GPU"
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < MIN_TRITON:
        return f"Triton must be 3.3 or later, got {triton.__version__} (PyTorch 2.7 brings 3.3)"
    return None if torch.cuda.is_available() or _interpreted() else "PyTorch sees no GPU"


def refuses(call: RowCall) -> str | None:
    """Why this call cannot be served; None: it can."""
    logits = call.logits_STV
    if (reason := refuses_device(logits.device)) is not None:
        return reason
    if logits.shape[-1] > MAX_VOCABULARY:
        return f"the vocabulary must be at most {MAX_VOCABULARY}, got {logits.shape[-1]}"
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        return f"logits must have stride 1 along the vocabulary, got {logits.stride(-1)}; pass logits.contiguous()"
    return None


def refuses_device(device: torch.device) -> str | None:
    """Why no kernel runs there; None: they do."""
    if device.type != ("cpu" if _interpreted() else "cuda"):
        where = "on the CPU under TRITON_INTERPRET=1" if _interpreted() else "on a GPU"
        return f"logits must be {where}, got {device.type}"
    if device.type == "cuda" and not _is_new_enough(device.index):
        return "the GPU must have compute capability 8.0 or later"
    return None


@cache
def _is_new_enough(device_index: int) -> bool:
    return bool(torch.version.hip) or torch.cuda.get_device_capability(device_index) >= MIN_CAPABILITY


def run(call: RowCall) -> RowResult:
    """Loss, statistics and, if wanted, the gradient of a call; see `RowResult`."""
    from gft_kernels.triton_kernels.row_loss import row_loss_kernel

    logits, rows, objective = call.logits_STV.detach(), call.credit.targets_R.numel(), call.objective
    with _on(logits.device):
        credit = credit_rows(call.credit)
        gradient = gradient_for(logits, call.inplace, call.gradient_dtype) if call.want_gradient else None
        loss_R, log_prob_R, coefficient_R = (_float32(logits, rows) for _ in range(3))
        entropy_R = _float32(logits, rows) if call.needs_entropy else None
        row_scale_R = _float32(logits, rows) if call.defer_scale and gradient is not None else None
        launch = _row_launch(logits, call.softcap)
        row_loss_kernel[(rows,)](
            logits,
            logits if gradient is None else gradient,
            call.credit.targets_R,
            credit.live_R.view(torch.uint8),
            credit.advantages_R,
            credit.weights_R,
            loss_R,
            log_prob_R,
            coefficient_R,
            loss_R if entropy_R is None else entropy_R,
            loss_R if row_scale_R is None else row_scale_R,
            credit.live_R.view(torch.uint8) if objective.given_R is None else objective.given_R.view(torch.uint8),
            loss_R if objective.old_log_probs_R is None else objective.old_log_probs_R,
            loss_R if objective.ref_log_probs_R is None else objective.ref_log_probs_R,
            *_shape(logits),
            *_outer_strides(logits),
            *_outer_strides(logits if gradient is None else gradient),
            **_objective(objective),
            **_transform(call),
            peak=0.0 if row_scale_R is None else FP16_PEAK,
            read_all=int(call.reads_every_live_row),
            want_gradient=int(gradient is not None),
            ENTROPY=call.needs_entropy,
            BLOCK=launch.block,
            **launch.options(),
        )
        loss = loss_R if call.credit.reduction == "none" else loss_R.sum(dtype=torch.float64).float()
    asked_R = entropy_R if call.want_entropy else None
    return RowResult(loss, log_prob_R, coefficient_R, credit.advantages_R, gradient, row_scale_R, asked_R)


def scale(
    gradient: Tensor,
    row_scale_R: Tensor | None,
    upstream: Tensor,
    inplace: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """gradient·row_scale·upstream in float32, rounded once; upstream is () or (R,) and is read on the device only.

    dtype: of the result, where it is not the gradient's own; then the gradient is float32, and not scaled in place.
    """
    from gft_kernels.triton_kernels.scale_rows import scale_rows_kernel

    with _on(gradient.device):
        out = gradient_for(gradient, inplace, dtype)
        launch = _row_launch(gradient)
        upstream = upstream.float().contiguous()
        scale_rows_kernel[(gradient.shape[0] * gradient.shape[1],)](
            gradient,
            out,
            upstream if row_scale_R is None else row_scale_R,
            upstream,
            *_shape(gradient),
            *_outer_strides(gradient),
            *_outer_strides(out),
            upstream_stride=int(upstream.dim() > 0),
            has_row_scale=int(row_scale_R is not None),
            in_place=int(inplace),
            BLOCK=launch.block,
            **launch.options(),
        )
    return out


def shard_statistics(call: RowCall, columns_R: Tensor, read_R: Tensor) -> ShardStatistics:
    """F1 and F2 over a vocabulary shard, in float32; see `ShardStatistics`."""
    from gft_kernels.triton_kernels.shard import shard_statistics_kernel

    logits = call.logits_STV.detach()
    with _on(logits.device):
        top_R, mass_R, gap_R, target_logit_R = (_float32(logits, columns_R.numel()) for _ in range(4))
        launch = _row_launch(logits, call.softcap)
        shard_statistics_kernel[(columns_R.numel(),)](
            logits,
            columns_R,
            read_R.view(torch.uint8),
            top_R,
            mass_R,
            gap_R,
            target_logit_R,
            *_shape(logits),
            *_outer_strides(logits),
            **_transform(call),
            ENTROPY=call.needs_entropy,
            BLOCK=launch.block,
            **launch.options(),
        )
    return ShardStatistics(top_R, mass_R, gap_R if call.needs_entropy else None, target_logit_R)


def shard_gradient(call: RowCall, columns_R: Tensor, agreed: AgreedRows) -> Tensor:
    """F7 over a vocabulary shard, from what is known of the whole rows."""
    from gft_kernels.triton_kernels.shard import shard_gradient_kernel

    logits = call.logits_STV.detach()
    with _on(logits.device):
        gradient = gradient_for(logits, call.inplace, call.gradient_dtype)
        launch = _row_launch(logits, call.softcap)
        shard_gradient_kernel[(columns_R.numel(),)](
            logits,
            gradient,
            columns_R,
            *agreed,
            *_shape(logits),
            *_outer_strides(logits),
            *_outer_strides(gradient),
            **_transform(call),
            ENTROPY=call.objective.entropy_coef != 0.0,
            BLOCK=launch.block,
            **launch.options(),
        )
    return gradient


def row_sizes(rows_RV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The twin of `linear.measures.row_sizes`, for rows that begin at multiples of 16 bytes."""
    from gft_kernels.triton_kernels.measures import row_sizes_kernel

    assert _begin_aligned(rows_RV)
    with _on(rows_RV.device):
        top_R, sum_R, square_R = (_float32(rows_RV, len(rows_RV)) for _ in range(3))
        launch = _row_launch(rows_RV)
        row_sizes_kernel[(len(rows_RV),)](
            rows_RV, top_R, sum_R, square_R, rows_RV.shape[1], rows_RV.stride(0), BLOCK=launch.block, **launch.options()
        )
    return top_R, sum_R, square_R


def group_sums(rows_RV: Tensor, group: int, factor_R: Tensor, squared: bool = False) -> Tensor:
    """The twin of `linear.measures.group_sums`, for rows that begin at multiples of 16 bytes."""
    from gft_kernels.triton_kernels.launch import COLUMNS, ROWS
    from gft_kernels.triton_kernels.measures import group_sums_kernel

    assert _begin_aligned(rows_RV)
    rows, vocabulary = rows_RV.shape
    with _on(rows_RV.device):
        sum_NV = torch.empty(-(-rows // group), vocabulary, dtype=torch.float32, device=rows_RV.device)
        group_sums_kernel[(-(-vocabulary // COLUMNS.block), len(sum_NV))](
            rows_RV,
            factor_R,
            sum_NV,
            rows,
            group,
            vocabulary,
            rows_RV.stride(0),
            SQUARED=squared,
            BLOCK=COLUMNS.block,
            ROWS=ROWS,
            **COLUMNS.options(),
        )
    return sum_NV


def _begin_aligned(rows_RV: Tensor) -> bool:
    bytes_apart = rows_RV.stride(0) * rows_RV.dtype.itemsize
    return rows_RV.stride(1) == 1 and bytes_apart % 16 == 0 and rows_RV.data_ptr() % 16 == 0


@cache
def _interpreted() -> bool:
    """Whether Triton made the kernels for its interpreter, as it does if TRITON_INTERPRET=1 when they are defined."""
    from triton import JITFunction

    from gft_kernels.triton_kernels.row_loss import row_loss_kernel

    return not isinstance(row_loss_kernel, JITFunction)


def _on(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device.index) if device.type == "cuda" else nullcontext()


def _row_launch(logits: Tensor, softcap: float = 0.0):
    from gft_kernels.triton_kernels.launch import architecture, row_launch

    name = architecture(logits.device.index) if logits.device.type == "cuda" else "interpreter"
    return row_launch(logits.shape[-1], logits.dtype, name, softcapped=softcap != 0.0)


def _float32(like: Tensor, rows: int) -> Tensor:
    return torch.empty(rows, dtype=torch.float32, device=like.device)


def _objective(objective: Objective) -> dict[str, float]:
    """The numbers of an objective, as the row kernel takes them."""
    return {
        **_rule("", *rule_values(objective)),
        **_rule("given_", *rule_values(objective.given)),
        "beta": objective.beta,
        "kl_cap": objective.kl_cap,
        "kl_estimator": objective.kl_estimator,
        "entropy_coef": objective.entropy_coef,
        "has_given": int(objective.given_R is not None),
        "has_old": int(objective.old_log_probs_R is not None),
    }


@lru_cache(maxsize=64, typed=True)
def _rule(prefix: str, *values: Any) -> dict[str, float]:
    """A rule's numbers, and its names by their place."""
    numbers = dict(zip(RULE_FIELDS, values, strict=True))
    numbers["surrogate"] = SURROGATES.index(numbers["surrogate"])
    numbers["rectify"] = RECTIFY.index(numbers["rectify"])
    return {prefix + name: number for name, number in numbers.items()}


def _transform(call: RowCall) -> dict[str, float]:
    """What the kernels do to a logit. Without a softcap the temperature is folded into the scale, here in float64."""
    if call.softcap == 0.0:
        return {"logit_scale": call.logit_scale / call.temperature, "temperature": 1.0, "SOFTCAP": 0.0}
    return {"logit_scale": call.logit_scale, "temperature": call.temperature, "SOFTCAP": call.softcap}


def _shape(logits_STV: Tensor) -> tuple[int, int]:
    """The kernels' `tokens` and `V`."""
    return max(logits_STV.shape[1], 1), logits_STV.shape[2]


def _outer_strides(logits_STV: Tensor) -> tuple[int, int]:
    return logits_STV.stride(0), logits_STV.stride(1)
