"""The only importer of the C++ kernels (`gft_kernels._C`), and how a call becomes addresses, sizes and strides.

The extension is optional: an install without a compiler has none. It is looked for once, when first needed.
"""

from __future__ import annotations

from dataclasses import fields
from functools import lru_cache, partial
from operator import attrgetter
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gft_kernels.options import (
    RULE_FIELDS,
    AgreedRows,
    BackendUnavailable,
    Credit,
    Objective,
    RowCall,
    RowResult,
    ShardStatistics,
    gradient_for,
    rule_values,
)

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@lru_cache(maxsize=1)
def _load() -> tuple[ModuleType | None, str]:
    try:
        from gft_kernels import _C  # type: ignore[attr-defined]
    except ImportError as error:
        return None, f"the C++ kernels are not built or do not load ({error}); reinstall with GFT_BUILD=cpu to see why"
    return _C, ""


def absent() -> str | None:
    """Why there are no C++ kernels, as a sentence; None if there are."""
    return _load()[1] or None


def kernels() -> ModuleType:
    """The extension. Raises BackendUnavailable where there is none."""
    module, reason = _load()
    if module is None:
        raise BackendUnavailable(reason)
    return module


def has_cuda() -> bool:
    """Whether the extension was built with the CUDA kernels."""
    module, _ = _load()
    return hasattr(module, "cuda")


def address(tensor: Tensor | None) -> int:
    """Where a tensor's first element lies; 0 says "absent"."""
    return 0 if tensor is None else tensor.data_ptr()


def logit_rows(rows_STV: Tensor) -> object:
    """Logits or their gradient with their strides over S and T; the kernels need unit stride over V."""
    strides = rows_STV.stride()[:2]
    return kernels().LogitRows(
        data=rows_STV.data_ptr(), dtype=_DTYPES[rows_STV.dtype], shape=rows_STV.shape, strides=strides
    )


def empty_result(call: RowCall) -> RowResult:
    """Memory for what a kernel hands back, uninitialised; in place the gradient is the logits' own."""
    logits, rows = call.logits_STV.detach(), call.credit.targets_R.numel()
    new = partial(torch.empty, dtype=torch.float32, device=logits.device)
    return RowResult(
        loss=new(rows if call.credit.reduction == "none" else ()),
        log_probs_R=new(rows),
        coefficients_R=new(rows),
        advantages_R=new(rows),
        gradient_STV=gradient_for(logits, call.inplace, call.gradient_dtype) if call.want_gradient else None,
        row_scale_R=new(rows) if call.defer_scale else None,
        entropy_R=new(rows) if call.want_entropy else None,
    )


def native_call(call: RowCall, result: RowResult) -> object:
    """A call as the C++ struct. It holds addresses only: keep `call` and `result` alive while a kernel uses it."""
    return kernels().RowCall(
        logits=logit_rows(call.logits_STV),
        credit=_credit(call.credit),
        transform=_transform(call.logit_scale, call.softcap, call.temperature),
        objective=_objective(call.objective),
        read_every_row=call.reads_every_live_row,
        loss=address(result.loss),
        log_probs_R=address(result.log_probs_R),
        coefficients_R=address(result.coefficients_R),
        advantages_R=address(result.advantages_R),
        entropy_R=address(result.entropy_R),
        row_scale_R=address(result.row_scale_R),
        gradient=None if result.gradient_STV is None else logit_rows(result.gradient_STV),
    )


def group_advantages(
    rewards_S: Tensor, group_size: int, group_ids_S: Tensor | None, normalize: str, eps: float, singleton: str
) -> Tensor:
    """F5 on the CPU: (S,) float64 rewards give (S,) float32 advantages; without ids each K responses are a group."""
    rewards_S, advantages_S = rewards_S.contiguous(), torch.empty(rewards_S.shape, dtype=torch.float32)
    if group_ids_S is not None:
        group_ids_S = group_ids_S.to(torch.int64).contiguous()
    kernels().group_advantages(
        rewards_S.numel(), address(rewards_S), group_size, address(group_ids_S), normalize, eps, singleton,
        address(advantages_S),
    )  # fmt: skip
    return advantages_S


def all_finite(values: Tensor) -> bool:
    """Of contiguous float32 numbers on the CPU."""
    return kernels().all_finite(values.data_ptr(), values.numel())


def all_within(ids: Tensor, stop: int) -> bool:
    """Whether contiguous int64 ids on the CPU lie in [0, stop)."""
    return kernels().all_within(ids.data_ptr(), ids.numel(), stop)


# Calls that the two modules of kernels have alike: `_C` and `_C.cuda`, each told in its own words where to run.


def scale(
    native: ModuleType,
    gradient_STV: Tensor,
    row_scale_R: Tensor | None,
    upstream: Tensor,
    inplace: bool,
    dtype: torch.dtype | None,
    **where: Any,
) -> Tensor:
    """gradient·row_scale·upstream, one product in float32 and one rounding; upstream is () or (R,).

    dtype: of the result, where it is not the gradient's own; then the gradient is float32, and not scaled in place.
    """
    out = gradient_for(gradient_STV, inplace, dtype)
    upstream, rows = upstream.to(torch.float32).contiguous(), logit_rows(gradient_STV)
    native.scale_rows(
        gradient=rows,
        out=rows if inplace else logit_rows(out),
        row_scale_R=address(row_scale_R),
        upstream=address(upstream),
        upstream_per_row=upstream.dim() > 0,
        **where,
    )
    return out


def shard_statistics(
    native: ModuleType, call: RowCall, columns_R: Tensor, read_R: Tensor, dtype: torch.dtype, **where: Any
) -> ShardStatistics:
    """F1 over a vocabulary shard; see `ShardStatistics`. Rows that read_R leaves out give the neutral state."""
    top_R, mass_R, gap_R, target_logit_R = torch.empty(4, columns_R.numel(), dtype=dtype, device=columns_R.device)
    statistics = ShardStatistics(top_R, mass_R, gap_R if call.needs_entropy else None, target_logit_R)
    addresses = {name: address(numbers) for name, numbers in statistics._asdict().items()}
    native.shard_statistics(_shard(call, columns_R), read_R=address(read_R), **addresses, **where)
    return statistics


def shard_gradient(native: ModuleType, call: RowCall, columns_R: Tensor, agreed: AgreedRows, **where: Any) -> Tensor:
    """F7 over a vocabulary shard; a row whose scale and tilt are 0 is not read, and its gradient exactly 0."""
    out = gradient_for(call.logits_STV.detach(), call.inplace, call.gradient_dtype)
    given = agreed._asdict()
    if call.objective.entropy_coef == 0.0:  # then there is no tilt to read
        given |= {"tilt_R": None, "entropy_R": None}
    rows = kernels().AgreedRows(**{name: address(numbers) for name, numbers in given.items()})
    native.shard_gradient(_shard(call, columns_R), agreed=rows, out=logit_rows(out), **where)
    return out


def _shard(call: RowCall, columns_R: Tensor) -> object:
    logits = logit_rows(call.logits_STV.detach())
    transform = _transform(call.logit_scale, call.softcap, call.temperature)
    return kernels().Shard(logits=logits, columns_R=address(columns_R), transform=transform)


def misaligned(call: RowCall) -> str | None:
    """Why C++ cannot read this call's memory: a tensor that starts in the middle of one of its elements."""
    for place, tensor in zip(_TENSORS, _tensors_of(call), strict=True):
        if tensor is not None and (past := tensor.data_ptr() % tensor.element_size()):
            argument, size = place.rpartition(".")[2].rpartition("_")[0], tensor.element_size()
            return f"{argument} must start at a multiple of {size} bytes, got {past} bytes past one; clone() it"
    return None


def _tensor_names(part: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(part) if str(field.type).startswith("Tensor"))


def _credit(credit: Credit) -> object:
    rewards_S = credit.rewards_S
    assert rewards_S is None or rewards_S.dtype == torch.float64, "C++ reads rewards as doubles"
    given = vars(credit) | {name: address(getattr(credit, name)) for name in _OF_CREDIT}
    given["tokens_per_response"] = max(credit.tokens_per_response, 1)
    return kernels().Credit(S=credit.responses, R=credit.targets_R.numel(), **given)


def _objective(objective: Objective) -> object:
    addresses = map(address, _objective_tensors(objective))
    return _objective_of(_numbers_of(objective), rule_values(objective), rule_values(objective.given), *addresses)


# Made of numbers and addresses alone, and so the same for the same ones.


@lru_cache(maxsize=256)
def _objective_of(numbers: tuple, rule: tuple, given: tuple, *addresses: int) -> object:
    rules = (kernels().Rule(**dict(zip(RULE_FIELDS, values, strict=True))) for values in (rule, given))
    rest = dict(zip((*_NUMBERS, *_OF_OBJECTIVE), (*numbers, *addresses), strict=True))
    return kernels().Objective(**dict(zip(("rule", "given"), rules, strict=True)), **rest)


@lru_cache(maxsize=256)
def _transform(logit_scale: float, softcap: float, temperature: float) -> object:
    return kernels().Transform(logit_scale=logit_scale, softcap=softcap, temperature=temperature)


_OF_CREDIT, _OF_OBJECTIVE = _tensor_names(Credit), _tensor_names(Objective)
_TENSORS = ("logits_STV", *(f"credit.{name}" for name in _OF_CREDIT), *(f"objective.{name}" for name in _OF_OBJECTIVE))
_ELSEWHERE = {*RULE_FIELDS, *_OF_OBJECTIVE, "given", "over_sequence"}  # the last is settled before a backend is asked
_NUMBERS = tuple(field.name for field in fields(Objective) if field.name not in _ELSEWHERE)
_tensors_of, _objective_tensors = attrgetter(*_TENSORS), attrgetter(*_OF_OBJECTIVE)
_numbers_of = attrgetter(*_NUMBERS)
