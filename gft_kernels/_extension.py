"""The only importer of the C++ kernels (`gft_kernels._C`), and how a call becomes addresses, sizes and strides.

The extension is optional: an install without a compiler has none. It is looked for once, when first needed.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from gft_kernels.options import BackendUnavailable, Credit, Objective, RowCall, RowResult


@lru_cache(maxsize=1)
def _load() -> tuple[ModuleType | None, str]:
    try:
        from gft_kernels import _C
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
    shape, strides = tuple(rows_STV.shape), tuple(rows_STV.stride())
    dtype = str(rows_STV.dtype).removeprefix("torch.")
    return kernels().LogitRows(data=address(rows_STV), dtype=dtype, shape=shape, strides=strides[:2])


def transform(logit_scale: float, softcap: float, temperature: float) -> object:
    return kernels().Transform(logit_scale=logit_scale, softcap=softcap, temperature=temperature)


def empty_result(call: RowCall) -> RowResult:
    """Memory for what a kernel hands back, uninitialised; in place the gradient is the logits' own."""
    logits, rows = call.logits_STV.detach(), call.credit.targets_R.numel()

    def per_row(wanted: bool = True) -> Tensor | None:
        return torch.empty(rows, dtype=torch.float32, device=logits.device) if wanted else None

    gradient = None
    if call.want_gradient:
        gradient = logits if call.inplace else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    loss_shape = (rows,) if call.credit.reduction == "none" else ()
    log_probs, coefficients, advantages = per_row(), per_row(), per_row()
    assert log_probs is not None and coefficients is not None and advantages is not None
    return RowResult(
        loss=torch.empty(loss_shape, dtype=torch.float32, device=logits.device),
        log_probs_R=log_probs,
        coefficients_R=coefficients,
        advantages_R=advantages,
        gradient_STV=gradient,
        row_scale_R=per_row(call.defer_scale),
        entropy_R=per_row(call.want_entropy),
    )


def native_call(call: RowCall, result: RowResult) -> object:
    """A call as the C++ struct. It holds addresses only: keep `call` and `result` alive while a kernel uses it."""
    return kernels().RowCall(
        logits=logit_rows(call.logits_STV),
        credit=_native_credit(call.credit),
        transform=transform(call.logit_scale, call.softcap, call.temperature),
        objective=_native_objective(call.objective),
        read_zero_advantage=call.reads_every_live_row,
        loss=address(result.loss),
        log_probs_R=address(result.log_probs_R),
        coefficients_R=address(result.coefficients_R),
        advantages_R=address(result.advantages_R),
        entropy_R=address(result.entropy_R),
        row_scale_R=address(result.row_scale_R),
        gradient=None if result.gradient_STV is None else logit_rows(result.gradient_STV),
    )


def _native_objective(objective: Objective) -> object:
    return kernels().Objective(
        surrogate=objective.surrogate,
        tau=objective.tau,
        rectify=objective.rectify,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        beta=objective.beta,
        entropy_coef=objective.entropy_coef,
        old_log_probs_R=address(objective.old_log_probs_R),
        ref_log_probs_R=address(objective.ref_log_probs_R),
    )


def _native_credit(credit: Credit) -> object:
    return kernels().Credit(
        S=_responses(credit),
        R=credit.targets_R.numel(),
        targets_R=address(credit.targets_R),
        mask_R=address(credit.mask_R),
        rewards_S=address(credit.rewards_S),
        advantages_S=address(credit.advantages_S),
        advantages_R=address(credit.advantages_R),
        weights_R=address(credit.weights_R),
        group_size=credit.group_size,
        group_ids_S=address(credit.group_ids_S),
        sequence_ids_R=address(credit.sequence_ids_R),
        tokens_per_response=max(credit.tokens_per_response, 1),
        num_items=address(credit.num_items),
        reduction=credit.reduction,
        ignore_index=credit.ignore_index,
        normalize=credit.normalize,
        eps=credit.eps,
        singleton=credit.singleton,
    )


def _responses(credit: Credit) -> int:
    """S: as many as there are rewards or advantages; without them, no response has an id of R or more."""
    per_response = credit.rewards_S if credit.rewards_S is not None else credit.advantages_S
    if per_response is not None:
        return per_response.numel()
    rows = credit.targets_R.numel()
    return rows if credit.sequence_ids_R is not None else -(-rows // max(credit.tokens_per_response, 1))
