"""Every check of what a caller passes, once. Errors are one sentence: argument, condition, value, remedy.

`row_call` turns public arguments into the `RowCall` all backends see; it looks at types, shapes and devices only, so it
can be traced. `check_values` looks at the numbers; it runs inside the operator, and only for tensors on the CPU, where
looking costs no synchronisation. (On a GPU a bad target or response id gives a NaN row instead.)
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gft_kernels.options import BACKENDS, NORMALIZE, RECTIFY, REDUCTIONS, SINGLETON, Credit, Objective, RowCall

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int64, torch.int32)


def row_call(
    logits: Tensor,
    targets: Tensor,
    *,
    rewards: Tensor | None,
    advantages: Tensor | None,
    group_size: int | None,
    group_ids: Tensor | None,
    sequence_ids: Tensor | None,
    mask: Tensor | None,
    objective: Objective,
    temperature: float,
    softcap: float | None,
    reduction: str,
    num_items_in_batch: float | Tensor | None,
    ignore_index: int,
    normalize: str,
    eps: float,
    singleton: str,
    inplace: bool,
    return_stats: bool,
    return_entropy: bool,
    backend: str,
    process_group: torch.distributed.ProcessGroup | None,
    logit_scale: float | None = None,
) -> RowCall:
    """The canonical form of a loss over logits. Raises ValueError or TypeError."""
    check_logits(logits, sharded=process_group is not None)
    want_gradient = torch.is_grad_enabled() and logits.requires_grad
    if inplace and want_gradient:
        check_inplace(logits)
    check_transform(temperature, softcap, logit_scale)
    one_of("backend", backend, BACKENDS)
    credit = row_credit(
        targets,
        tuple(logits.shape[:-1]),
        logits.device,
        rewards=rewards,
        advantages=advantages,
        group_size=group_size,
        group_ids=group_ids,
        sequence_ids=sequence_ids,
        mask=mask,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
        ignore_index=ignore_index,
        normalize=normalize,
        eps=eps,
        singleton=singleton,
    )
    return RowCall(
        logits_STV=logits if logits.dim() == 3 else logits.unsqueeze(0),
        credit=credit,
        objective=objective,
        logit_scale=1.0 if logit_scale is None else float(logit_scale),
        softcap=0.0 if softcap is None else float(softcap),
        temperature=float(temperature),
        want_gradient=want_gradient,
        inplace=inplace,
        want_stats=return_stats,
        want_entropy=return_entropy,
        defer_scale=want_gradient and logits.dtype == torch.float16,
        process_group=group_name(process_group),
    )


def row_credit(
    targets: Tensor,
    rows_shape: tuple[int, ...],
    device: torch.device,
    *,
    rewards: Tensor | None,
    advantages: Tensor | None,
    group_size: int | None,
    group_ids: Tensor | None,
    sequence_ids: Tensor | None,
    mask: Tensor | None,
    reduction: str,
    num_items_in_batch: float | Tensor | None,
    ignore_index: int,
    normalize: str,
    eps: float,
    singleton: str,
) -> Credit:
    """The canonical form of everything but the logits; `rows_shape` is (S, T) or (R,). Raises ValueError, TypeError."""
    one_of("reduction", reduction, REDUCTIONS)
    packed = len(rows_shape) == 1
    check_tensor("targets", targets, INDEX_DTYPES, rows_shape, device, "pass one token id per row of logits")
    if mask is not None:
        check_tensor("mask", mask, (torch.bool,), rows_shape, device, "pass True where a row counts")
    if sequence_ids is not None:
        if not packed:
            raise ValueError(
                f"sequence_ids must be left out for padded rows of shape {rows_shape}, got a tensor; "
                "there the first dimension is the response"
            )
        check_tensor("sequence_ids", sequence_ids, INDEX_DTYPES, rows_shape, device, "pass one response id per row")
    elif packed and reduction == "sequence-mean":
        raise ValueError("sequence_ids must be given for packed rows with reduction='sequence-mean', got None; "
                         "pass the response id of each row")  # fmt: skip
    if rewards is not None and advantages is not None:
        raise ValueError("rewards and advantages must not both be given, got both; pass the one you have")
    responses = None if packed else rows_shape[0]
    advantages_S, advantages_R = _advantages(advantages, rows_shape, device, sequence_ids)
    if rewards is not None:
        if packed and sequence_ids is None:
            raise ValueError("sequence_ids must be given for packed rows with rewards, got None; "
                             "pass the response id of each row")  # fmt: skip
        check_rewards(rewards, responses, device)
        check_groups(rewards.shape[0], group_size, group_ids, device)
        check_normalisation(normalize, eps, singleton)
    else:
        _refuse_unused(group_size, group_ids, normalize, eps, singleton)
    return Credit(
        targets_R=_flat(targets, torch.int64),
        mask_R=None if mask is None else _flat(mask, torch.bool),
        rewards_S=None if rewards is None else _flat(rewards, torch.float32),
        advantages_S=advantages_S,
        advantages_R=advantages_R,
        group_size=group_size or 0,
        group_ids_S=None if group_ids is None else _flat(group_ids, torch.int64),
        sequence_ids_R=None if sequence_ids is None else _flat(sequence_ids, torch.int64),
        tokens_per_response=rows_shape[-1],
        num_items=_num_items(num_items_in_batch, reduction, device),
        reduction=reduction,
        ignore_index=int(ignore_index),
        normalize=normalize,
        eps=float(eps),
        singleton=singleton,
    )


def group_name(process_group: torch.distributed.ProcessGroup | None) -> str:
    """The name a group is found by inside an operator; "" for none."""
    if process_group is None:
        return ""
    if not torch.distributed.is_available() or not isinstance(process_group, torch.distributed.ProcessGroup):
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup this rank belongs to, got "
            f"{type(process_group).__name__}; pass what new_group() returned, or mesh.get_group() of a device mesh"
        )
    return process_group.group_name


def check_logits(logits: Tensor, name: str = "logits", sharded: bool = False) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(logits).__name__}; pass the model's output tensor")
    if logits.dim() not in (2, 3):
        raise ValueError(
            f"{name} must have shape (S, T, V) or (R, V), got {tuple(logits.shape)}; reshape to one of the two"
        )
    if logits.dtype not in LOGIT_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {logits.dtype}; cast it first")
    if logits.shape[-1] < 1 and not sharded:  # a rank's shard may be empty
        raise ValueError(f"{name} must have a vocabulary of at least 1, got {tuple(logits.shape)}; check the last size")


def check_inplace(logits: Tensor) -> None:
    """In place the storage becomes the gradient: refuse storage that is a parameter's or that rows share."""
    base = logits if torch.compiler.is_compiling() or not logits._is_view() else logits._base
    if base is not None and base.is_leaf and base.requires_grad:
        raise ValueError("inplace must be False for logits that are (a view of) a leaf requiring grad, got True; "
                         "its values would be overwritten by their gradient")  # fmt: skip
    if any(stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True)):
        raise ValueError(
            f"inplace must be False for expanded logits, got strides {logits.stride()}; rows would share one gradient"
        )


def gft_objective(tau: float, rectify: str) -> Objective:
    """F4 with its options. Raises ValueError."""
    if not 0.0 <= tau <= 1.0:
        raise ValueError(f"tau must lie in [0, 1], got {tau}; 0 is SFT, 1 is DFT, the paper's best is 0.7")
    one_of("rectify", rectify, RECTIFY)
    return Objective(tau=float(tau), rectify=rectify)


def check_transform(temperature: float, softcap: float | None, logit_scale: float | None) -> None:
    positive("temperature", temperature, "1.0 leaves the logits as they are")
    if softcap is not None:
        positive("softcap", softcap, "pass None for no softcap")
    if logit_scale is not None and not (is_finite(logit_scale) and logit_scale != 0.0):
        raise ValueError(f"logit_scale must be finite and not 0, got {logit_scale}; pass None for no scale")


def check_rewards(rewards: Tensor, responses: int | None, device: torch.device | None) -> None:
    shape = None if responses is None else (responses,)
    check_tensor("rewards", rewards, None, shape, device, "pass one reward per response")
    if rewards.dim() != 1:
        raise ValueError(f"rewards must have shape (S,), got {tuple(rewards.shape)}; pass one reward per response")


def check_groups(responses: int, group_size: int | None, group_ids: Tensor | None, device: torch.device | None) -> None:
    if (group_size is None) == (group_ids is None):
        given = "neither" if group_size is None else "both"
        raise ValueError(
            f"group_size or group_ids must be given with rewards, exactly one of them, got {given}; "
            "pass group_size=K for K consecutive responses per prompt"
        )
    if group_ids is not None:
        check_tensor("group_ids", group_ids, INDEX_DTYPES, (responses,), device, "pass one group id per response")
    elif isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ValueError(
            f"group_size must be a whole number of at least 1, got {group_size!r}; pass responses per prompt"
        )
    elif responses % group_size:
        raise ValueError(
            f"group_size must divide the number of responses, got {group_size} for {responses}; "
            "pass group_ids for groups of different sizes"
        )


def check_normalisation(normalize: str, eps: float, singleton: str) -> None:
    one_of("normalize", normalize, NORMALIZE)
    one_of("singleton", singleton, SINGLETON)
    if not (is_finite(eps) and eps >= 0.0):
        raise ValueError(f"eps must be finite and not negative, got {eps}; the paper uses 1e-6")


def check_values(credit: Credit, vocabulary: int) -> None:
    """Targets, response ids, rewards and the denominator of a call on the CPU. Raises ValueError."""
    if credit.targets_R.device.type != "cpu":
        return
    live_R = credit.live_R
    remedy = f"mark rows that do not count with ignore_index={credit.ignore_index} or mask=False"
    _in_range("targets", credit.targets_R, live_R, vocabulary, remedy)
    if credit.sequence_ids_R is not None:
        per_response = credit.rewards_S if credit.rewards_S is not None else credit.advantages_S
        stop = live_R.numel() if per_response is None else per_response.numel()
        _in_range("sequence_ids", credit.sequence_ids_R, live_R, stop, "number the responses from 0")
    if credit.rewards_S is not None:
        check_reward_values(credit.rewards_S, credit.normalize, credit.group_size, credit.group_ids_S)
    if credit.num_items is not None and not float(credit.num_items) > 0:
        raise ValueError(
            f"num_items_in_batch must be positive, got {float(credit.num_items):g}; "
            "pass the token count of the whole batch, or None to count the live rows of this call"
        )


def check_reward_values(rewards: Tensor, normalize: str, group_size: int | None, group_ids: Tensor | None) -> None:
    """Rewards on the CPU: finite, and their advantages must fit float32. Raises ValueError.

    A division by their spread makes them fit, as long as float64 holds the squares; a group of one has none.
    """
    low, high = torch.aminmax(rewards) if len(rewards) else (0.0, 0.0)
    if low >= -1e38 and high <= 1e38:  # neither holds for a NaN
        return
    check_finite("rewards", rewards)
    sizes = torch.tensor(group_size) if group_ids is None else torch.unique(group_ids, return_counts=True)[1]
    limit = 1e150 if normalize == "std" and (sizes > 1).all() else 1e38
    large = (rewards.abs() > limit).nonzero()
    if len(large):
        at = int(large[0])
        raise ValueError(
            f"rewards must lie within {limit:g} of 0, got {float(rewards[at]):g} at position {at}; "
            "divide them all by one number"
        )


def check_finite(name: str, values: Tensor) -> None:
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        at = int(bad[0])
        raise ValueError(
            f"{name} must be finite, got {float(values[at])} at position {at}; drop or score that response"
        )


def check_tensor(
    name: str,
    value: Tensor,
    dtypes: Sequence[torch.dtype] | None,
    shape: tuple[int, ...] | None,
    device: torch.device | None,
    remedy: str,
) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}; {remedy}")
    if dtypes is not None and value.dtype not in dtypes:
        allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must be {allowed}, got {value.dtype}; cast it first")
    if shape is not None and tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}; {remedy}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device} like the logits, got {value.device}; move it there")


def known_options(function: Callable, options: dict) -> None:
    """Keyword options fixed ahead of the call must be options of the function. Raises TypeError."""
    known = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            raise TypeError(
                f"{name} must be an option of {function.__name__}, got an unknown name; choose from {', '.join(known)}"
            )


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}; pick one of these")


def is_finite(value: float) -> bool:
    """As math.isfinite, which torch.compile cannot ask of a number that changes between calls."""
    return abs(value) < math.inf


def positive(name: str, value: float, remedy: str) -> None:
    if not (is_finite(value) and value > 0.0):
        raise ValueError(f"{name} must be finite and positive, got {value}; {remedy}")


def _advantages(
    advantages: Tensor | None, rows_shape: tuple[int, ...], device: torch.device, sequence_ids: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Advantages as (per response, per row): one shape per row, or (S,) for padded or sequence-numbered rows."""
    if advantages is None:
        return None, None
    check_tensor("advantages", advantages, None, None, device, "pass one per response or one per row")
    if tuple(advantages.shape) == rows_shape:
        return None, _flat(advantages, torch.float32)
    padded_S = len(rows_shape) == 2 and tuple(advantages.shape) == rows_shape[:1]
    packed_S = sequence_ids is not None and advantages.dim() == 1
    if padded_S or packed_S:
        return _flat(advantages, torch.float32), None
    per_response = f" or {rows_shape[:1]}" if len(rows_shape) == 2 else ""
    raise ValueError(
        f"advantages must have shape {rows_shape}{per_response}, got {tuple(advantages.shape)}; "
        + ("pass one per row or per response" if per_response else "or pass sequence_ids with one per response")
    )


def _refuse_unused(
    group_size: int | None, group_ids: Tensor | None, normalize: str, eps: float, singleton: str
) -> None:
    """Without rewards nothing is normalised: an option that asks for it would be ignored in silence."""
    for name, value, default in (
        ("group_size", group_size, None),
        ("group_ids", group_ids, None),
        ("normalize", normalize, "std"),
        ("eps", eps, 1e-6),
        ("singleton", singleton, "reward"),
    ):
        if value is not default and (isinstance(value, Tensor) or value != default):
            shown = "a tensor" if isinstance(value, Tensor) else repr(value)
            raise ValueError(
                f"{name} must be left out without rewards, got {shown}; it only shapes how rewards become advantages"
            )


def _num_items(value: float | Tensor | None, reduction: str, device: torch.device) -> Tensor | None:
    if value is None:
        return None
    if reduction in ("sum", "none"):
        raise ValueError(
            f"num_items_in_batch must be None with reduction={reduction!r}, got a value; nothing is divided"
        )
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"num_items_in_batch must hold one number, got shape {tuple(value.shape)}; sum it first")
        return value.detach().reshape(()).to(device=device, dtype=torch.float32, non_blocking=True)
    return torch.full((), float(value), dtype=torch.float32, device=device)


def _flat(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.detach().to(dtype).reshape(-1).contiguous()


def _in_range(name: str, values_R: Tensor, live_R: Tensor, stop: int, remedy: str) -> None:
    bad = ((values_R < 0) | (values_R >= stop)) & live_R
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(f"{name} must lie in [0, {stop}), got {int(values_R[at])} at row {at}; {remedy}")
