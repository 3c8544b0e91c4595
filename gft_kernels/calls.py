"""Public arguments to the calls that operators and backends see: `RowCall`, `LinearCall` and the `Credit` in both.

Types, shapes and devices are looked at, never numbers in tensors, so all of it can be traced. Every function here
raises ValueError or TypeError, one sentence that names the argument.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gft_kernels import checks, linear_checks
from gft_kernels.arguments import DEFAULTS, PolicyOptions
from gft_kernels.options import BACKENDS, Credit, LinearCall, Objective, RowCall, on_rows


def row_call(
    name: str, logits: Tensor, targets: Tensor, objective: Objective, reduction: str, given: PolicyOptions
) -> RowCall:
    """A loss over logits, which the caller knows by `name`."""
    for argument in ("bias", "chunk_rows", "accum_dtype", "logits_dtype", "filter_eps"):
        if given[argument] is not None:
            value = checks.shown(given[argument])
            raise ValueError(
                f"{argument} must be left out without weight, got {value}; with logits there is no product"
            )
    shared = _shared(given)
    checks.check_logits(name, logits, sharded=given["process_group"] is not None)
    checks.flag("inplace", given["inplace"])
    want_gradient = torch.is_grad_enabled() and logits.requires_grad
    if given["inplace"] and want_gradient:
        checks.check_inplace(logits)
    return RowCall(
        logits_STV=logits if logits.dim() == 3 else logits.unsqueeze(0),
        credit=row_credit(targets, tuple(logits.shape[:-1]), logits.device, reduction, given),
        objective=objective,
        want_gradient=want_gradient,
        inplace=given["inplace"],
        defer_scale=want_gradient and logits.dtype == torch.float16,
        **shared,
    )


def linear_call(
    name: str, hidden: Tensor, targets: Tensor, objective: Objective, reduction: str, given: PolicyOptions
) -> LinearCall:
    """A loss over hidden states, which the caller knows by `name`, and an output head."""
    weight, bias = given["weight"], given["bias"]
    linear_checks.check_head(weight, bias)
    assert weight is not None
    checks.flag("inplace", given["inplace"])
    if given["inplace"]:
        raise ValueError("inplace must be False with weight, got True; hidden states are not overwritten")
    shared = _shared(given)
    linear_checks.check_hidden(name, hidden, weight, sharded=given["process_group"] is not None)
    product = linear_checks.product_dtype(name, hidden, weight)
    logits_dtype, accum_dtype = linear_checks.check_precision(product, given["logits_dtype"], given["accum_dtype"])
    chunk_rows = given["chunk_rows"]
    if chunk_rows is not None:
        chunk_rows = checks.whole("chunk_rows", chunk_rows, 1, "pass None to let it be chosen")
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    per_row = reduction == "none"  # then the rows' weights, and the gradients with them, arrive in backward
    return LinearCall(
        hidden_STD=hidden if hidden.dim() == 3 else hidden.unsqueeze(0),
        weight_VD=weight,
        bias_V=bias,
        credit=row_credit(targets, tuple(hidden.shape[:-1]), hidden.device, reduction, given),
        objective=objective,
        chunk_rows=chunk_rows or 0,
        product_dtype=product,
        logits_dtype=logits_dtype,
        accum_dtype=accum_dtype,
        filter_eps=linear_checks.filter_eps(given["filter_eps"], product),
        want_hidden=wanted[0] and not per_row,
        want_weight=wanted[1] and not per_row,
        want_bias=wanted[2] and not per_row,
        **shared,
    )


def _shared(given: PolicyOptions) -> dict[str, Any]:
    """What both calls have, beside their credit and objective."""
    checks.one_of("backend", given["backend"], BACKENDS)
    checks.flag("return_entropy", given["return_entropy"])
    temperature, softcap, logit_scale = checks.check_transform(
        given["temperature"], given["softcap"], given["logit_scale"]
    )
    return {
        "logit_scale": logit_scale,
        "softcap": softcap,
        "temperature": temperature,
        "want_stats": given["return_stats"],
        "want_entropy": given["return_entropy"],
        "process_group": _group_name(given["process_group"]),
    }


def row_credit(
    targets: Tensor, rows_shape: tuple[int, ...], device: torch.device, reduction: str, given: PolicyOptions
) -> Credit:
    """Everything but the logits; `rows_shape` is (S, T) or (R,)."""
    mask, sequence_ids, rewards, group_ids = (
        given["mask"], given["sequence_ids"], given["rewards"], given["group_ids"],
    )  # fmt: skip
    packed = len(rows_shape) == 1
    checks.check_tensor("targets", targets, checks.INDEX_DTYPES, rows_shape, device, "pass one token id per row")
    if mask is not None:
        checks.check_tensor("mask", mask, (torch.bool,), rows_shape, device, "pass True where a row counts")
    _check_sequence_ids(sequence_ids, rows_shape, device, reduction, rewards is not None)
    if rewards is not None and given["advantages"] is not None:
        raise ValueError("rewards and advantages must not both be given, got both; pass the one you have")
    group_size = 0
    if rewards is not None:
        checks.check_rewards(rewards, None if packed else rows_shape[0], device)
        group_size = checks.check_groups(rewards.shape[0], given["group_size"], group_ids, device)
    else:
        _refuse_unused(given)
    checks.check_normalisation(given["normalize"], given["eps"], given["singleton"])
    advantages_S, advantages_R = _advantages(given["advantages"], rows_shape, device, sequence_ids)
    ignore = checks.whole("ignore_index", given["ignore_index"], -checks.INT64, "pass the id that marks unused rows")
    return Credit(
        targets_R=_flat(targets, torch.int64),
        mask_R=None if mask is None else _flat(mask, torch.bool),
        rewards_S=None if rewards is None else _flat(rewards, torch.float64),
        advantages_S=advantages_S,
        advantages_R=advantages_R,
        weights_R=_weights(given["weights"], rows_shape, device, sequence_ids),
        group_size=group_size,
        group_ids_S=None if group_ids is None else _flat(group_ids, torch.int64),
        sequence_ids_R=None if sequence_ids is None else _flat(sequence_ids, torch.int64),
        tokens_per_response=rows_shape[-1],
        num_items=_num_items(given["num_items_in_batch"], reduction, device),
        reduction=reduction,
        ignore_index=ignore,
        normalize=given["normalize"],
        eps=float(given["eps"]),
        singleton=given["singleton"],
    )


def _check_sequence_ids(
    sequence_ids: Any, rows_shape: tuple[int, ...], device: torch.device, reduction: str, has_rewards: bool
) -> None:
    packed = len(rows_shape) == 1
    if sequence_ids is not None:
        if not packed:
            raise ValueError(
                f"sequence_ids must be left out for padded rows of shape {rows_shape}, got "
                f"{checks.shown(sequence_ids)}; there the first dimension is the response"
            )
        remedy = "pass one response id per row"
        checks.check_tensor("sequence_ids", sequence_ids, checks.INDEX_DTYPES, rows_shape, device, remedy)
    elif packed and (has_rewards or reduction == "sequence-mean"):
        wanted = "rewards" if has_rewards else "reduction='sequence-mean'"
        raise ValueError(
            f"sequence_ids must be given for packed rows with {wanted}, got None; pass the response id of each row"
        )


def _advantages(
    advantages: Tensor | None, rows_shape: tuple[int, ...], device: torch.device, sequence_ids: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Advantages as (per response, per row): one shape per row, or (S,) for padded or sequence-numbered rows."""
    if advantages is None:
        return None, None
    checks.check_tensor("advantages", advantages, None, None, device, "pass one per response or one per row")
    per_row = _is_per_row("advantages", advantages, rows_shape, sequence_ids)
    flat = _flat(advantages, torch.float32)
    return (None, flat) if per_row else (flat, None)


def _weights(
    weights: Tensor | None, rows_shape: tuple[int, ...], device: torch.device, sequence_ids: Tensor | None
) -> Tensor | None:
    """(R,) float32, from one per row or per response."""
    if weights is None:
        return None
    checks.check_tensor("weights", weights, None, None, device, "pass one per response or one per row")
    flat = _flat(weights, torch.float32)
    if _is_per_row("weights", weights, rows_shape, sequence_ids):
        return flat
    ids_R = None if sequence_ids is None else _flat(sequence_ids, torch.int64)
    return on_rows(flat, ids_R, rows_shape[-1], outside=math.nan)


def _is_per_row(name: str, value: Tensor, rows_shape: tuple[int, ...], sequence_ids: Tensor | None) -> bool:
    """Whether a tensor holds one number per row, else one per response. Raises ValueError where it holds neither."""
    if tuple(value.shape) == rows_shape:
        return True
    padded_S = len(rows_shape) == 2 and tuple(value.shape) == rows_shape[:1]
    if padded_S or (sequence_ids is not None and value.dim() == 1):
        return False
    per_response = f" or {rows_shape[:1]}" if len(rows_shape) == 2 else ""
    raise ValueError(
        f"{name} must have shape {rows_shape}{per_response}, got {tuple(value.shape)}; "
        + ("pass one per row or per response" if per_response else "or pass sequence_ids with one per response")
    )


def _refuse_unused(given: PolicyOptions) -> None:
    """Without rewards nothing is normalised: an option that asks for it would be ignored in silence."""
    for name in ("group_size", "group_ids", "normalize", "eps", "singleton"):
        value, default = given[name], DEFAULTS[name]
        if value is not default and (not isinstance(value, (str, int, float)) or value != default):
            raise ValueError(
                f"{name} must be left out without rewards, got {checks.shown(value)}; "
                "it only shapes how rewards become advantages"
            )


def _num_items(value: Any, reduction: str, device: torch.device) -> Tensor | None:
    """The denominator as a float32 scalar on the device. A tensor's number is looked at in `checks.check_values`."""
    if value is None:
        return None
    if reduction in ("sum", "none"):
        raise ValueError(
            f"num_items_in_batch must be None with reduction={reduction!r}, got a value; nothing is divided"
        )
    remedy = "pass the token count of the whole batch, or None to count the live rows of this call"
    checks.check_constant("num_items_in_batch", value)
    if isinstance(value, Tensor):
        checks.check_tensor("num_items_in_batch", value, None, None, None, remedy)
        if value.dtype == torch.bool:
            raise TypeError(f"num_items_in_batch must be a number, got {value.dtype}; {remedy}")
        if value.device.type == "meta" != device.type:
            raise TypeError(f"num_items_in_batch must be a number, got a tensor on meta; {remedy}")
        if value.numel() != 1:
            raise ValueError(f"num_items_in_batch must hold one number, got shape {tuple(value.shape)}; sum it first")
        return value.detach().reshape(()).to(device=device, dtype=torch.float32, non_blocking=True)
    items = checks.positive_float32("num_items_in_batch", value, remedy)
    return torch.full((), items, dtype=torch.float32, device=device)


def _group_name(process_group: Any) -> str:
    """The name a group is found by inside an operator; "" for none."""
    if process_group is None:
        return ""
    if not torch.distributed.is_available() or not isinstance(process_group, torch.distributed.ProcessGroup):
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup this rank belongs to, got "
            f"{type(process_group).__name__}; pass what new_group() returned, or mesh.get_group() of a device mesh"
        )
    return process_group.group_name


def _flat(value: Tensor, dtype: torch.dtype) -> Tensor:
    if value.dim() == 1 and value.dtype == dtype and value.is_contiguous() and not value.requires_grad:
        return value.detach()  # also of a forward-mode tangent
    return value.detach().to(dtype).reshape(-1).contiguous()
