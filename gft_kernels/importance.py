"""Weights of samples whose engine had other log-probabilities than the trainer: truncated importance sampling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gft_kernels import checks

LEVELS = ("token", "sequence")
BOUNDS = ("truncate", "mask")


def importance_weights(
    log_probs: Tensor,
    rollout_log_probs: Tensor,
    *,
    mask: Tensor | None = None,
    level: str = "token",
    bound: str = "truncate",
    high: float | None = 2.0,
    low: float | None = None,
    sequence_ids: Tensor | None = None,
) -> Tensor:
    """Weights for samples of an engine whose numbers are not the trainer's: w = pi / pi_rollout, within bounds.

    Pass them as `weights`; to leave rejected rows out of the denominator too, `mask=mask & (w > 0)`.

    Args:
        log_probs: log pi of each token under the policy that was meant to sample, in nats: (S, T), or packed (R,).
        rollout_log_probs: log pi of the same tokens as the engine had it.
        mask: bool of the same shape: the tokens that count; others get weight 0. None: all.
        level: "token", or "sequence": the product over the response's tokens, on each of them.
        bound: "truncate" holds w in [low, high]; "mask" makes it 0 outside.
        high: the upper bound; None: none.
        low: the lower bound; None: none.
        sequence_ids: of packed rows, for level "sequence": the response of each.

    Returns: float32 of the shape of log_probs.
    Raises: ValueError, TypeError. On the CPU also for a log-probability that counts and is not finite; on a GPU its
        weight may be NaN.
    Source: truncated importance sampling, fengyao.notion.site/off-policy-rl; TRL's
        vllm_importance_sampling_mode (token_truncate, token_mask, sequence_truncate, sequence_mask).
    """
    device, remedy = getattr(log_probs, "device", None), "pass one log-probability per token, in nats"
    checks.check_tensor("log_probs", log_probs, checks.LOG_PROB_DTYPES, None, None, remedy)
    shape = tuple(log_probs.shape)
    checks.check_tensor("rollout_log_probs", rollout_log_probs, checks.LOG_PROB_DTYPES, shape, device, remedy)
    checks.one_of("level", level, LEVELS)
    checks.one_of("bound", bound, BOUNDS)
    low = 0.0 if low is None else checks.not_negative("low", low, "None is no bound")
    high = math.inf if high is None else checks.positive("high", high, "None is no bound")
    if low > high:
        raise ValueError(f"low must be at most high, got {low:g} above {high:g}; no weight lies between them.")
    live = torch.ones(shape, dtype=torch.bool, device=device)
    if mask is not None:
        checks.check_tensor("mask", mask, (torch.bool,), shape, device, "pass True where a token counts")
        live = mask
    if sequence_ids is not None and (level == "token" or len(shape) != 1):
        raise ValueError(
            f"sequence_ids must be left out with level {level!r} and log_probs of shape {shape}, got "
            f"{checks.shown(sequence_ids)}; it belongs to packed rows of level 'sequence'"
        )
    for name, values in (("log_probs", log_probs), ("rollout_log_probs", rollout_log_probs)):
        if checks.can_be_read(values):
            remedy = "take tokens that do not count out with mask"
            checks.check_finite(name, values.detach().flatten(), live.flatten(), remedy)
    apart = torch.where(live, log_probs.detach().double() - rollout_log_probs.detach().double(), 0.0)
    if level == "sequence":
        apart = _of_response(apart, sequence_ids)
    weights = torch.exp(apart)
    if bound == "truncate":
        weights = weights.clamp(low, high)
    else:
        weights = torch.where((weights < low) | (weights > high), 0.0, weights)
    return torch.where(live, weights, 0.0).float()


def _of_response(values: Tensor, sequence_ids: Tensor | None) -> Tensor:
    """The sum over each response on each of its tokens: rows of (S, T), or equal ids of packed rows."""
    if values.dim() == 2 and sequence_ids is None:
        return values.sum(1, keepdim=True).expand_as(values)
    remedy = "pass the response id of each row, 0 to S - 1"
    checks.check_tensor("sequence_ids", sequence_ids, checks.INDEX_DTYPES, tuple(values.shape), values.device, remedy)
    assert sequence_ids is not None
    _, of_row = torch.unique(sequence_ids, return_inverse=True)
    return torch.zeros_like(values).index_add_(0, of_row, values)[of_row]
