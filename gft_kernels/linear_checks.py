"""What only the linear loss takes: hidden states, an output head, and the dtypes they are multiplied in.

The dtype policy: under autocast hidden and head are rounded to the autocast dtype, as a linear layer would; without it
they must have the same dtype. Gradients have the dtype of what they are the gradient of.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gft_kernels import checks
from gft_kernels.checks import LOGIT_DTYPES
from gft_kernels.linear_call import LinearCall
from gft_kernels.options import Objective


def linear_call(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    logit_scale: float | None,
    chunk_rows: int | None,
    accum_dtype: torch.dtype,
    logits_dtype: torch.dtype,
    objective: Objective,
    temperature: float,
    softcap: float | None,
    reduction: str,
    return_stats: bool,
    return_entropy: bool,
    process_group: torch.distributed.ProcessGroup | None,
    backend: str,
    **credit: Any,
) -> LinearCall:
    """The canonical form of a loss over hidden states; `credit` as in `checks.row_credit`. Raises as those checks."""
    check_head(weight, bias)
    check_hidden(hidden, weight, sharded=process_group is not None)
    product = product_dtype(hidden, weight)
    check_precision(product, logits_dtype, accum_dtype)
    check_chunk_rows(chunk_rows)
    checks.check_transform(temperature, softcap, logit_scale)
    checks.one_of("backend", backend, checks.BACKENDS)
    rows_shape = tuple(hidden.shape[:-1])
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    per_row = reduction == "none"  # then the rows' weights, and the gradients with them, arrive in backward
    return LinearCall(
        hidden_STD=hidden if hidden.dim() == 3 else hidden.unsqueeze(0),
        weight_VD=weight,
        bias_V=bias,
        credit=checks.row_credit(targets, rows_shape, hidden.device, reduction=reduction, **credit),
        objective=objective,
        logit_scale=1.0 if logit_scale is None else float(logit_scale),
        softcap=0.0 if softcap is None else float(softcap),
        temperature=float(temperature),
        want_stats=return_stats,
        want_entropy=return_entropy,
        process_group=checks.group_name(process_group),
        chunk_rows=chunk_rows or 0,
        product_dtype=product,
        logits_dtype=logits_dtype,
        accum_dtype=accum_dtype,
        want_hidden=wanted[0] and not per_row,
        want_weight=wanted[1] and not per_row,
        want_bias=wanted[2] and not per_row,
    )


def check_head(weight: Any, bias: Any) -> None:
    """The head must be a plain floating-point matrix that is all here. Raises ValueError, TypeError."""
    instead = "or compute the logits by calling the layer and pass them to gft_loss"
    if hasattr(weight, "base_layer") or hasattr(weight, "lora_A"):
        raise TypeError(
            f"weight must be a tensor without an adapter, got the adapter layer {type(weight).__name__}; "
            f"merge the adapter, train the head in full (peft's modules_to_save), {instead}"
        )
    if isinstance(weight, torch.nn.Module):
        raise TypeError(
            f"weight must be a tensor, got the module {type(weight).__name__}; pass its .weight and its .bias"
        )
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a torch.Tensor, got {type(weight).__name__}; pass lm_head.weight")
    for name, value in (("weight", weight), ("bias", bias)):
        _check_plain(name, value, instead)
    if weight.dim() != 2:
        raise ValueError(f"weight must have shape (V, D), got {tuple(weight.shape)}; pass lm_head.weight as it is")
    _check_dtype("weight", weight)
    if bias is not None:
        checks.check_tensor(
            "bias", bias, LOGIT_DTYPES, weight.shape[:1], weight.device, "pass one number per token, or None"
        )


def _check_plain(name: str, value: Any, instead: str) -> None:
    if hasattr(value, "full_tensor") and hasattr(value, "placements"):
        raise TypeError(
            f"{name} must be a plain tensor, got a DTensor; pass {name}.full_tensor(), or with a head sharded over the "
            f"vocabulary {name}.to_local() and process_group=, {instead}"
        )
    if hasattr(value, "ds_id") and value.numel() == 0:
        raise ValueError(
            f"{name} must be all here, got a ZeRO-3 parameter of 0 elements; "
            f"call this inside deepspeed.zero.GatheredParameters([{name}]), {instead}"
        )
    if hasattr(value, "quant_state") or hasattr(value, "__tensor_flatten__"):
        raise TypeError(
            f"{name} must be a plain floating-point tensor, got {type(value).__name__}, which packs its numbers; "
            f"keep the head unquantised, {instead}"
        )


def _check_dtype(name: str, value: Tensor) -> None:
    if value.dtype not in LOGIT_DTYPES:
        raise TypeError(
            f"{name} must be float32, bfloat16 or float16, got {value.dtype}; cast it first, or keep it unquantised"
        )


def check_hidden(hidden: Any, weight: Tensor, sharded: bool) -> None:
    """Hidden states that fit the head. Raises ValueError, TypeError."""
    if not isinstance(hidden, Tensor):
        raise TypeError(f"hidden must be a torch.Tensor, got {type(hidden).__name__}; pass the last hidden state")
    _check_plain("hidden", hidden, "or compute the logits and pass them to gft_loss")
    if hidden.dim() not in (2, 3):
        raise ValueError(
            f"hidden must have shape (S, T, D) or (R, D), got {tuple(hidden.shape)}; reshape to one of the two"
        )
    _check_dtype("hidden", hidden)
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"weight must have shape (V, {hidden.shape[-1]}) to fit hidden of shape {tuple(hidden.shape)}, "
            f"got {tuple(weight.shape)}; pass lm_head.weight, not its transpose"
        )
    if weight.shape[0] < 1 and not sharded:  # a rank's shard may be empty
        raise ValueError(
            "weight must hold a vocabulary of at least 1, got 0 rows; gather it first if it is partitioned (FSDP)"
        )
    if hidden.device != weight.device:
        raise ValueError(f"hidden must be on {weight.device} like the weight, got {hidden.device}; move it there")


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype hidden and weight are rounded to before they are multiplied. Raises TypeError."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"hidden must have the dtype of weight ({weight.dtype}) outside autocast, got {hidden.dtype}; "
            "cast one of them, or call under torch.autocast"
        )
    return hidden.dtype


def check_precision(product: torch.dtype, logits_dtype: Any, accum_dtype: Any) -> None:
    """Logits and the gradients' sums are float32, or bfloat16 where the products are. Raises ValueError."""
    for name, value in (("logits_dtype", logits_dtype), ("accum_dtype", accum_dtype)):
        if value != torch.float32 and not (value == torch.bfloat16 and product == torch.bfloat16):
            raise ValueError(
                f"{name} must be torch.float32, or torch.bfloat16 where hidden and weight are multiplied in bfloat16, "
                f"got {value} for products in {product}; leave it out"
            )


def check_chunk_rows(chunk_rows: Any) -> None:
    if chunk_rows is not None and (isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int) or chunk_rows < 1):
        raise ValueError(
            f"chunk_rows must be a whole number of at least 1, got {chunk_rows!r}; pass None to let it be chosen"
        )
