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

SMALLEST_EPS = 1e-6  # of what is left out: the float32 sums over a row, by which it is known, are no better


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
    _check_plain("weight", weight, instead)
    if weight.dim() != 2:
        raise ValueError(f"weight must have shape (V, D), got {tuple(weight.shape)}; pass lm_head.weight as it is")
    checks.check_float("weight", weight, "cast it first, or keep it unquantised")
    if bias is not None:
        if isinstance(bias, Tensor):
            _check_plain("bias", bias, instead)
        checks.check_tensor(
            "bias", bias, LOGIT_DTYPES, weight.shape[:1], weight.device, "pass one number per token, or None"
        )


def _check_plain(name: str, value: Tensor, instead: str) -> None:
    checks.check_dense(name, value)
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


def check_hidden(name: str, hidden: Any, weight: Tensor, sharded: bool) -> None:
    """Hidden states that fit the head. name: what the caller calls them. Raises ValueError, TypeError."""
    checks.check_rows(name, hidden, "D", "pass the last hidden state")
    _check_plain(name, hidden, "or compute the logits and pass them to gft_loss")
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"weight must have shape (V, {hidden.shape[-1]}) to fit {name} of shape {tuple(hidden.shape)}, "
            f"got {tuple(weight.shape)}; pass lm_head.weight, not its transpose"
        )
    if weight.shape[0] < 1 and not sharded:  # a rank's shard may be empty
        raise ValueError(
            "weight must hold a vocabulary of at least 1, got 0 rows; gather it first if it is partitioned (FSDP)"
        )
    if hidden.device != weight.device:
        raise ValueError(f"{name} must be on {weight.device} like the weight, got {hidden.device}; move it there")


def product_dtype(name: str, hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype hidden and weight are rounded to before they are multiplied. Raises TypeError."""
    kind = hidden.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"{name} must have the dtype of weight ({weight.dtype}) outside autocast, got {hidden.dtype}; "
            "cast one of them, or call under torch.autocast"
        )
    return hidden.dtype


def check_precision(product: torch.dtype, logits_dtype: Any, accum_dtype: Any) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of logits and gradient sums: float32, or bfloat16 where the products are. Raises ValueError, TypeError."""
    for name, value in (("logits_dtype", logits_dtype), ("accum_dtype", accum_dtype)):
        allowed = (None, torch.float32, *([torch.bfloat16] if product == torch.bfloat16 else []))
        if not (value is None or isinstance(value, torch.dtype)) or value not in allowed:
            error = ValueError if isinstance(value, torch.dtype) else TypeError
            raise error(
                f"{name} must be torch.float32, or torch.bfloat16 where hidden and weight are multiplied in bfloat16, "
                f"got {checks.shown(value)} for products in {product}; leave it out"
            )
    return logits_dtype or torch.float32, accum_dtype or torch.float32


def filter_eps(value: Any, product: torch.dtype) -> float:
    """How much of the logits' gradient its products may leave out, in norm; 0: nothing. Raises ValueError, TypeError.

    "auto" is an eighth of the products' unit roundoff, behind which what is left out disappears (docs/linear.md). In
    float32 nothing disappears: rows and columns are summed with errors of that size.
    """
    if value is None:
        return 0.0
    if isinstance(value, str) and value == "auto":
        return 0.0 if product == torch.float32 else torch.finfo(product).eps / 16
    condition, remedy = 'be None, "auto" or a number in [1e-6, 1)', "None leaves nothing out"
    if isinstance(value, str):
        raise ValueError(f"filter_eps must {condition}, got {checks.shown(value)}; {remedy}")
    return checks.real("filter_eps", value, lambda x: SMALLEST_EPS <= x < 1.0, condition, remedy)
