"""Who gets what: group-normalised advantages (F5) and each row's weight under the reduction, in plain torch.

Sizes: S responses, G groups of K, T rows of a padded response, R rows. Nothing here waits for a GPU: ragged groups are
found by sorting, never by reading values back. The triton and reference backends, the linear loss and the sharded one
share this text; csrc/ has its own, which answers `group_advantages` on the CPU: a tenth of a dozen operators' time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gft_kernels import _extension, checks, formulas
from gft_kernels.options import SPLIT, Credit, Objective, on_rows


def group_advantages(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    normalize: str = "std",
    eps: float = 1e-6,
    singleton: str = "reward",
    given: Tensor | None = None,
    imitation: float = 1.0,
) -> Tensor:
    """Rewards standardised within their group of responses: A = (R - mean) / (std + eps), F5.

    Args:
        rewards: (S,) of any real dtype, one per response.
        group_size: K consecutive responses per group; or
        group_ids: (S,) integers, equal ids share a group, in any order.
        normalize: "std" (Bessel-corrected), "mean" (no division) or "leave-one-out" (minus the others' mean); "split"
            weighs samples among themselves, R - mean of the other samples, and what is given against them,
            imitation·(R - mean of the samples).
        eps: added to the standard deviation, outside the root; "std" alone divides by it.
        singleton: advantage of a group of one, and with "split" of a single sample: its "reward" or "zero".
        given: (S,) bool, for "split" alone: the responses that were not sampled from the policy.
        imitation: for "split" alone: the weight of what is given.

    Returns: (S,) float32 on the rewards' device; exactly 0 for a group of equal rewards. What is between is
        float64, so rewards may be as close to each other as that tells them apart: whole ones below 2^53 in size; with
        "std" those within 1e-162 of each other count as equal.
    Raises: ValueError, TypeError. On the CPU a reward that is not finite, or whose advantage would not fit float32, is
        an error, and so is a whole number of 2^53 or more; on a GPU the one spoils its group, the other is rounded.
    Source: docs/formulas.md#F5.
    """
    checks.check_rewards(rewards, None, None)
    size = checks.check_groups(rewards.shape[0], group_size, group_ids, rewards.device)
    checks.check_split(normalize, given, imitation, rewards)
    checks.check_normalisation("mean" if normalize == SPLIT else normalize, eps, singleton)
    rewards = rewards.double()
    readable = checks.can_be_read(rewards)
    if readable:
        checks.check_reward_values(rewards.detach(), normalize, size, group_ids)
    if given is not None:
        ids = torch.arange(len(rewards), device=rewards.device) // size if group_ids is None else group_ids
        return _split(rewards, ids, given, float(imitation), singleton)
    how = (size, group_ids, normalize, float(eps), singleton)
    if readable and _is_a_constant(rewards) and _extension.absent() is None:
        return _extension.group_advantages(rewards, *how)
    return normalise(rewards, *how)


def _is_a_constant(rewards: Tensor) -> bool:
    """Whether nobody differentiates or records what is made of the rewards."""
    if rewards.requires_grad and torch.is_grad_enabled():
        return False
    return forward_ad._current_level < 0 and not checks.is_watched()


class RowCredit(NamedTuple):
    """What the logits' pass needs to know of a row; all of shape (R,)."""

    live_R: Tensor  # bool
    advantages_R: Tensor  # float32, 0 on masked rows
    weights_R: Tensor  # float32, 0 on masked rows


class Moments(NamedTuple):
    """Rewards by their distance from the first of their group, and that distance's statistics. Float64.

    Equal rewards are 0 apart, exactly: sums of equal numbers, divided by how many they are, need not be the number.
    """

    apart: Tensor
    mean: Tensor  # of `apart`
    std: Tensor  # Bessel-corrected
    size: Tensor  # K


def normalise(
    rewards_S: Tensor, group_size: int, group_ids_S: Tensor | None, normalize: str, eps: float, singleton: str
) -> Tensor:
    """F5: (S,) rewards of any real dtype give (S,) float32 advantages; without ids each K responses are a group."""
    rewards = rewards_S.double()
    alone = rewards if singleton == "reward" else torch.zeros_like(rewards)
    if group_ids_S is not None:
        ids, order = torch.sort(group_ids_S, stable=True)
        group = _runs(rewards[order], ids)
        advantages = torch.where(group.size == 1, alone[order], _standardised(group, normalize, eps)).float()
        return torch.empty_like(advantages).index_copy_(0, order, advantages)
    if group_size == 1 or not rewards.numel():
        return alone.float()
    return _standardised(_consecutive(rewards.reshape(-1, group_size)), normalize, eps).float().view(-1)


def over_batch_spread(advantages: Tensor, scored: Tensor, eps: float) -> Tensor:
    """Advantages of normalize "mean" to those of "batch": over the deviation of a step's rewards, all that were scored.

    No reward and one have no deviation, and divide nothing.
    """
    return advantages if len(scored) < 2 else formulas.group_advantage(advantages, 0.0, scored.std(), eps)


def _standardised(group: Moments, normalize: str, eps: float) -> Tensor:
    if normalize == "std":
        return formulas.group_advantage(group.apart, group.mean, group.std, eps)
    if normalize == "mean":
        return group.apart - group.mean
    # leave-one-out: R - mean of the others = (R - mean)·K / (K - 1)
    return formulas.group_advantage(group.apart, group.mean, (group.size - 1) / group.size, 0.0)


def _split(rewards_S: Tensor, ids_S: Tensor, given_S: Tensor, imitation: float, singleton: str) -> Tensor:
    """Samples against the other samples, what is given against all samples: (S,) float32."""
    order = torch.sort(given_S.byte(), stable=True)[1]  # a group's samples first, so that `apart` counts from one
    ids, by_group = torch.sort(ids_S[order], stable=True)
    order = order[by_group]
    rewards, given = rewards_S[order], given_S[order]
    start, stop = _bounds(ids)
    apart = rewards - rewards[start]
    shares = torch.stack([torch.where(given, 0.0, apart), (~given).double()])
    total, samples = _run_sums(shares, ids)[:, stop - 1]
    taught = imitation * torch.where(samples > 0, apart - total / samples.clamp(min=1), rewards)
    alone = rewards if singleton == "reward" else torch.zeros_like(rewards)
    found = torch.where(samples > 1, (samples * apart - total) / (samples - 1).clamp(min=1), alone)
    advantages = torch.where(given, taught, found).float()
    return torch.empty_like(advantages).index_copy_(0, order, advantages)


def _consecutive(rewards_GK: Tensor) -> Moments:
    apart = rewards_GK - rewards_GK[:, :1]
    size, mean = rewards_GK.shape[1], apart.mean(1, keepdim=True)
    std = torch.linalg.vector_norm(apart - mean, dim=1, keepdim=True) / math.sqrt(size - 1)  # ten times as fast as std
    return Moments(apart, mean, std, torch.tensor(size, device="cpu"))


def _runs(rewards_S: Tensor, ids_S: Tensor) -> Moments:
    """Groups that are runs of sorted ids, summed by a segmented scan.

    Deterministic on every device, S·log S work, and a NaN reward spoils its own group only.
    """
    start, stop = _bounds(ids_S)
    size = (stop - start).double()
    apart = rewards_S - rewards_S[start]
    total, squares = _run_sums(torch.stack([apart, apart * apart]), ids_S)[:, stop - 1]
    mean = total / size
    # The first of a group is 0 apart, so the squares' sum is at most 2·K times what this leaves: nothing cancels.
    variance = (squares - total * mean).clamp(min=0.0) / (size - 1).clamp(min=1)
    return Moments(apart, mean, torch.sqrt(variance), size)


def _bounds(ids_S: Tensor) -> tuple[Tensor, Tensor]:
    """Where each entry's run of equal ids begins, and one past where it ends."""
    return torch.searchsorted(ids_S, ids_S), torch.searchsorted(ids_S, ids_S, right=True)


def _run_sums(values_NS: Tensor, ids_S: Tensor) -> Tensor:
    """(N, S): each entry's sum over its run up to itself; after each step of the last 2·reach entries."""
    sums, reach = values_NS, 1
    while reach < ids_S.numel():
        carried = torch.where(ids_S[reach:] == ids_S[:-reach], sums[:, :-reach], 0.0)
        sums = torch.cat([sums[:, :reach], sums[:, reach:] + carried], 1)
        reach *= 2
    return sums


def credit_rows(credit: Credit) -> RowCredit:
    """Spread a call's rewards or advantages over its rows and weigh each row by the reduction."""
    live_R = credit.live_R
    advantages_R, weights_R = _advantages(credit), credit.weights_R
    ones_R = live_R.float()  # where rows count, 0 elsewhere: nothing else has to be masked
    advantages_R = ones_R if advantages_R is None else torch.where(live_R, advantages_R, 0.0)
    weights_R = ones_R if weights_R is None else torch.where(live_R, weights_R, 0.0)
    return RowCredit(live_R, advantages_R, _reduced(weights_R, credit, live_R))


def rows_read(credit: RowCredit, objective: Objective, every: bool) -> Tensor:
    """(R,) bool: live rows that have a loss or a gradient; `every`: all live rows, for their statistics."""
    if every:
        return credit.live_R
    acts_R = (credit.advantages_R != 0.0) | objective.acts_without_advantage
    return credit.live_R & acts_R & (credit.weights_R != 0.0)


def _advantages(credit: Credit) -> Tensor | None:
    """(R,), of rows that do not count anything; None: 1 for all."""
    if credit.advantages_S is not None:
        return _on_rows(credit.advantages_S, credit)
    if credit.rewards_S is None:
        return credit.advantages_R
    how = (credit.group_size, credit.group_ids_S, credit.normalize, credit.eps, credit.singleton)
    return _on_rows(normalise(credit.rewards_S, *how), credit)


def _reduced(weights_R: Tensor, credit: Credit, live_R: Tensor) -> Tensor:
    """The rows' own weights, 0 where they do not count, over what the reduction divides by."""
    if credit.reduction in ("sum", "none"):
        return weights_R
    if credit.reduction == "token-mean":
        return weights_R / (live_R.sum().clamp(min=1) if credit.num_items is None else credit.num_items)
    live_tokens_S = _live_tokens(credit, live_R)
    responses = (live_tokens_S > 0).sum().clamp(min=1).float() if credit.num_items is None else credit.num_items
    share_R = _on_rows(1.0 / (live_tokens_S.clamp(min=1) * responses), credit)
    return torch.where(live_R, weights_R * share_R, weights_R)  # the id of a row that does not count may be none


def _live_tokens(credit: Credit, live_R: Tensor) -> Tensor:
    """Live rows of each response."""
    if credit.sequence_ids_R is None:
        return live_R.view(-1, max(credit.tokens_per_response, 1)).sum(1)
    counts = torch.zeros(credit.responses + 1, dtype=torch.long, device=live_R.device)  # the last of rows of none
    return counts.scatter_add_(0, credit.responses_R, live_R.long())[:-1]  # whole numbers add up exactly, in any order


def _on_rows(values_S: Tensor, credit: Credit) -> Tensor:
    return on_rows(values_S, credit.sequence_ids_R, credit.tokens_per_response, outside=math.nan)
