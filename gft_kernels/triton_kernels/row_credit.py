"""The launches that turn a `Credit` into advantages and weights of rows, without a host synchronisation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gft_kernels.options import Credit
from gft_kernels.triton_kernels import credit as kernels
from gft_kernels.triton_kernels.configs import CreditLaunch

NORMALIZE = {"std": kernels.STD, "mean": kernels.MEAN, "leave-one-out": kernels.LEAVE_ONE_OUT}
LAUNCH = CreditLaunch()


class RowCredit(NamedTuple):
    """What the row kernel needs to know of each row, all of shape (R,)."""

    advantages_R: Tensor  # float32, 0 on masked rows
    weights_R: Tensor  # float32, 0 on masked rows
    read_R: Tensor  # uint8: 0 where the logits decide nothing


def row_credit(credit: Credit, read_all: bool) -> RowCredit:
    """Advantages, weights and which rows to read; `read_all`: live rows with A = 0 too."""
    targets_R = credit.targets_R
    rows, device = targets_R.numel(), targets_R.device
    mask_R = _or_nothing(credit.mask_R, torch.bool, device).view(torch.uint8)
    ids_R = _or_nothing(credit.sequence_ids_R, torch.int64, device)
    given, advantage_from = _given_advantages(credit)
    live_P, weight_from = _counts(credit, mask_R, ids_R)
    out = RowCredit(
        torch.empty(rows, dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.uint8, device=device),
    )
    kernels.row_credit_kernel[(_cdiv(rows, LAUNCH.rows),)](
        targets_R,
        mask_R,
        ids_R,
        given,
        _or_nothing(credit.weights_R, torch.float32, device),
        _or_nothing(credit.num_items, torch.float32, device),
        live_P,
        *out,
        R=rows,
        S=given.numel(),
        tokens=max(credit.tokens_per_response, 1),
        parts=live_P.numel(),
        ignore_index=credit.ignore_index,
        has_mask=int(credit.mask_R is not None),
        has_ids=int(credit.sequence_ids_R is not None),
        has_num_items=int(credit.num_items is not None),
        advantage_from=advantage_from,
        weight_from=weight_from,
        read_all=int(read_all),
        BLOCK=LAUNCH.rows,
    )
    return out


def _given_advantages(credit: Credit) -> tuple[Tensor, int]:
    """The advantages as given or normalised from rewards (F5), and whether they are per row or per response."""
    if credit.advantages_R is not None:
        return credit.advantages_R, kernels.PER_ROW.value
    if credit.advantages_S is not None:
        return credit.advantages_S, kernels.PER_RESPONSE.value
    if credit.rewards_S is None:
        return torch.empty(0, dtype=torch.float32, device=credit.targets_R.device), kernels.ONES.value
    rewards_S = credit.rewards_S
    advantages_S = torch.empty_like(rewards_S)
    kernels.group_advantage_kernel[(rewards_S.numel(),)](
        rewards_S,
        _or_nothing(credit.group_ids_S, torch.int64, rewards_S.device),
        advantages_S,
        S=rewards_S.numel(),
        group_size=credit.group_size if credit.group_ids_S is None else 0,
        normalize=NORMALIZE[credit.normalize].value,
        eps=credit.eps,
        singleton_reward=int(credit.singleton == "reward"),
        BLOCK=LAUNCH.rows,
    )
    return advantages_S, kernels.PER_RESPONSE.value


def _counts(credit: Credit, mask_R: Tensor, ids_R: Tensor) -> tuple[Tensor, int]:
    """Live rows per part of the rows (token-mean) or per response (sequence-mean), where a denominator needs them."""
    targets_R = credit.targets_R
    rows = targets_R.numel()
    if credit.weights_R is not None:
        return _live(targets_R, 0), kernels.PER_ROW.value
    if credit.reduction in ("sum", "none"):
        return _live(targets_R, 0), kernels.ONES.value
    masked = {"ignore_index": credit.ignore_index, "has_mask": int(credit.mask_R is not None)}
    if credit.reduction == "token-mean":
        live_P = _live(targets_R, _cdiv(rows, LAUNCH.rows) if credit.num_items is None else 0)
        kernels.count_tokens_kernel[(live_P.numel(),)](targets_R, mask_R, live_P, R=rows, **masked, BLOCK=LAUNCH.rows)
        return live_P, kernels.TOKEN_MEAN.value
    live_S = _live(targets_R, _responses(credit))
    kernels.count_responses_kernel[(_cdiv(live_S.numel(), LAUNCH.responses),)](
        targets_R,
        mask_R,
        ids_R,
        live_S,
        R=rows,
        S=live_S.numel(),
        tokens=max(credit.tokens_per_response, 1),
        **masked,
        has_ids=int(credit.sequence_ids_R is not None),
        RESPONSES=LAUNCH.responses,
        BLOCK=LAUNCH.rows_beside_responses,
    )
    return live_S, kernels.SEQUENCE_MEAN.value


def _responses(credit: Credit) -> int:
    """How many responses there can be: as many as rewards or advantages, else ids lie below the number of rows."""
    per_response = credit.rewards_S if credit.rewards_S is not None else credit.advantages_S
    if per_response is not None:
        return per_response.numel()
    rows = credit.targets_R.numel()
    return rows if credit.sequence_ids_R is not None else _cdiv(rows, max(credit.tokens_per_response, 1))


def _live(targets_R: Tensor, parts: int) -> Tensor:
    return torch.empty(parts, dtype=torch.int32, device=targets_R.device)


def _or_nothing(tensor: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tensor, or an empty one of its dtype: a pointer of another type would be another compilation."""
    return torch.empty(0, dtype=dtype, device=device) if tensor is None else tensor


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
