"""Who gets what: group-normalised advantages (F5) and each row's weight under the reduction, in plain torch.

Sizes: S responses, R rows. Nothing here waits for a GPU: groups are found by sorting, never by reading values back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gft_kernels import checks, formulas
from gft_kernels.options import Credit


def group_advantages(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    normalize: str = "std",
    eps: float = 1e-6,
    singleton: str = "reward",
) -> Tensor:
    """Rewards standardised within their group of responses: A = (R - mean) / (std + eps), F5.

    Args:
        rewards: (S,) of any real dtype, one per response.
        group_size: K consecutive responses per group; or
        group_ids: (S,) integers, equal ids share a group, in any order.
        normalize: "std" (Bessel-corrected), "mean" (no division) or "leave-one-out" (minus the others' mean).
        eps: added to the standard deviation, outside the root.
        singleton: advantage of a group of one: its "reward" or "zero".

    Returns: (S,) float32 on the rewards' device; exactly 0 for a group of equal rewards.
    Raises: ValueError, TypeError. On the CPU a reward that is not finite is an error; on a GPU it spoils its group.
    Source: docs/formulas.md#F5.
    """
    checks.check_rewards(rewards, None, None)
    checks.check_groups(rewards.shape[0], group_size, group_ids, rewards.device)
    checks.check_normalisation(normalize, eps, singleton)
    if rewards.device.type == "cpu":
        checks.check_finite("rewards", rewards)
    return normalise(rewards, _group_ids(rewards, group_size, group_ids), normalize, eps, singleton)


def _group_ids(rewards_S: Tensor, group_size: int | None, group_ids_S: Tensor | None) -> Tensor:
    if group_ids_S is not None:
        return group_ids_S
    assert group_size
    return torch.arange(rewards_S.numel(), device=rewards_S.device) // group_size


class RowCredit(NamedTuple):
    """What the logits' pass needs to know of a row; all of shape (R,)."""

    live_R: Tensor  # bool
    advantages_R: Tensor  # float32, 0 on masked rows
    weights_R: Tensor  # float32, 0 on masked rows


def normalise(rewards_S: Tensor, group_ids_S: Tensor, normalize: str, eps: float, singleton: str) -> Tensor:
    """F5 for any grouping: (S,) rewards and (S,) int64 group ids in any order give (S,) float32 advantages.

    Groups become runs of a sorted array, summed by a segmented scan (in float64): deterministic on every device,
    S·log S work, and a NaN reward spoils its own group only.
    """
    ids, order = torch.sort(group_ids_S, stable=True)
    # Float32 first: float64 sums of K equal float32 numbers are exact, so equal rewards give 0, not 1e-17 / eps.
    rewards = rewards_S.float().double()[order]
    start = torch.searchsorted(ids, ids, right=False)
    stop = torch.searchsorted(ids, ids, right=True)
    size = (stop - start).double()

    def group_sum(values: Tensor) -> Tensor:
        reach = 1
        while reach < values.numel():  # after each step an entry holds the sum of the last 2·reach of its run
            same_run = ids[reach:] == ids[:-reach]
            carried = torch.where(same_run, values[:-reach], 0.0)
            values = torch.cat([values[:reach], values[reach:] + carried])
            reach *= 2
        return values[stop - 1]

    mean = group_sum(rewards) / size
    if normalize == "std":
        spread = torch.sqrt(group_sum((rewards - mean) ** 2).clamp(min=0.0) / (size - 1).clamp(min=1))
        advantages = formulas.group_advantage(rewards, mean, spread, eps)
    elif normalize == "mean":
        advantages = formulas.group_advantage(rewards, mean, 1.0, 0.0)
    else:  # leave-one-out: R - mean of the others = (R - mean)·K / (K - 1)
        advantages = formulas.group_advantage(rewards, mean, (size - 1) / size, 0.0)
    alone = rewards if singleton == "reward" else torch.zeros_like(rewards)
    advantages = torch.where(size == 1, alone, advantages)
    return torch.empty_like(advantages).index_copy_(0, order, advantages).float()


def credit_rows(credit: Credit) -> RowCredit:
    """Spread a call's rewards or advantages over its rows and weigh each row by the reduction."""
    live_R = credit.live_R
    zero = torch.zeros((), device=live_R.device)
    advantages_R = torch.where(live_R, _advantages(credit, live_R), zero)
    weights_R = torch.where(live_R, _weights(credit, live_R), zero)
    return RowCredit(live_R, advantages_R, weights_R)


def _advantages(credit: Credit, live_R: Tensor) -> Tensor:
    if credit.advantages_R is not None:
        return credit.advantages_R
    if credit.rewards_S is not None:
        ids = _group_ids(credit.rewards_S, credit.group_size, credit.group_ids_S)
        advantages_S = normalise(credit.rewards_S, ids, credit.normalize, credit.eps, credit.singleton)
    elif credit.advantages_S is not None:
        advantages_S = credit.advantages_S
    else:
        return torch.ones(live_R.shape, device=live_R.device)
    responses_R = _responses(credit, live_R)
    if advantages_S.numel() == 0:  # then a live row belongs to no response
        return torch.full(live_R.shape, float("nan"), device=live_R.device)
    inside = (responses_R >= 0) & (responses_R < advantages_S.numel())
    gathered = advantages_S[responses_R.clamp(0, advantages_S.numel() - 1)]
    return torch.where(inside, gathered, float("nan"))


def _responses(credit: Credit, live_R: Tensor) -> Tensor:
    if credit.sequence_ids_R is not None:
        return credit.sequence_ids_R
    return torch.arange(live_R.numel(), device=live_R.device) // max(credit.tokens_per_response, 1)


def _weights(credit: Credit, live_R: Tensor) -> Tensor:
    if credit.weights_R is not None:
        return credit.weights_R
    if credit.reduction in ("sum", "none"):
        return torch.ones(live_R.shape, device=live_R.device)
    if credit.reduction == "token-mean":
        tokens = live_R.sum().clamp(min=1).float() if credit.num_items is None else credit.num_items
        return (1.0 / tokens).expand(live_R.shape)
    # sequence-mean. Response ids lie in [0, R) in this case, so R bins hold the counts; whole numbers add up exactly.
    responses_R = _responses(credit, live_R).clamp(0, max(live_R.numel() - 1, 0))
    live_tokens_S = torch.zeros(live_R.shape, dtype=torch.long, device=live_R.device)
    live_tokens_S.scatter_add_(0, responses_R, live_R.long())
    responses = (live_tokens_S > 0).sum().clamp(min=1).float() if credit.num_items is None else credit.num_items
    return 1.0 / (live_tokens_S[responses_R].clamp(min=1).float() * responses)
