"""Objectives whose ratio is a response's: what its tokens' log-probabilities say of it, between two passes over them.

The first pass takes log pi of every live row. A response's log ratio is the mean of its rows'. Written into pi_old, so
that pi / pi_old is the response's ratio on each of its rows, it makes of the second pass an ordinary one: no kernel
knows of sequences. Sizes: R rows, S responses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gft_kernels import formulas
from gft_kernels.advantages import credit_rows
from gft_kernels.options import SEQUENCE_RATIOS, Credit, Objective, on_rows

GEOMETRIC = SEQUENCE_RATIOS[1]
NEVER = 1e30  # a log pi_old, in nats, that makes a ratio of 0


def two_passes(run: Callable[[Any], Any], call: Any, unwanted: dict[str, Any]) -> Any:
    """The result of a loss's `run` for a call whose ratio is a response's: the logits for log pi, and for the loss.

    unwanted: what the first pass does without, as fields of the call. On-policy there is none: every ratio is 1.
    """
    if call.objective.old_log_probs_R is None:
        return run(replace(call, objective=replace(call.objective, over_sequence="")))
    seen = run(replace(call, objective=Objective(), want_stats=True, **unwanted))
    settled = settle(call.objective, call.credit, seen.log_probs_R, seen.advantages_R)
    result = run(replace(call, objective=settled.objective))
    return replace(result, loss=result.loss + lacking(settled, call.credit))


class Settled(NamedTuple):
    """An objective of tokens that has the gradient of one of responses, and what its loss lacks."""

    objective: Objective
    held_R: Tensor  # (R,) bool: rows that a bound of their own leaves without gradient
    missing_R: Tensor | None  # (R,) of each row's loss, before its weight; None: nothing


def settle(objective: Objective, credit: Credit, log_probs_R: Tensor, advantages_R: Tensor) -> Settled:
    """The second pass's objective, from log pi (nats) and A of every live row.

    "mean" (GSPO, arXiv 2507.18071): s = e^mean(log pi - log pi_old), clipped as grpo clips rho. "geometric" (GMPO,
    2507.20673): the mean is over log ratios held at -clip_low and clip_high, where A pushes them further; such a row
    has no gradient, yet its response's loss.
    """
    live_R, old_R = credit.live_R, objective.old_log_probs_R
    apart_R = formulas.log_ratio(log_probs_R, log_probs_R if old_R is None else old_R)
    geometric = objective.over_sequence == GEOMETRIC
    held_R = torch.zeros_like(live_R)
    if geometric:
        low, high = -objective.clip_low, objective.clip_high
        held_R = ((advantages_R > 0.0) & (apart_R > high)) | ((advantages_R < 0.0) & (apart_R < low))
        if objective.given_R is not None:  # those rows have a rule of their own
            held_R &= ~objective.given_R
        apart_R = torch.where(held_R, apart_R.clamp(low, high), apart_R)
    mean_R = _of_response(torch.where(live_R, apart_R, 0.0), live_R, credit)
    old_R = torch.where(held_R | (mean_R == formulas.NEG_INF), NEVER, log_probs_R - mean_R)
    plain = replace(objective, over_sequence="", old_log_probs_R=old_R)
    if not geometric:
        return Settled(plain, held_R, None)
    # A > 0: no mean is above clip_high. The bound is wide, so that no rounding meets it; below, A < 0, there is none.
    plain = replace(plain, clip_low=1.0, clip_high=2.0 * math.exp(objective.clip_high))
    return Settled(plain, held_R, torch.where(held_R & live_R, -advantages_R * torch.exp(mean_R), 0.0))


def lacking(settled: Settled, credit: Credit) -> Tensor | float:
    """What the second pass's loss lacks: (), or (R,) for reduction "none"."""
    if settled.missing_R is None:
        return 0.0
    missing_R = formulas.weighed(credit_rows(credit).weights_R, settled.missing_R)
    return missing_R if credit.reduction == "none" else missing_R.double().sum().float()


def _of_response(values_R: Tensor, live_R: Tensor, credit: Credit) -> Tensor:
    """The mean over the live rows of each row's response, in float64 between."""
    ids_R, places = credit.responses_R, credit.responses + 1  # the last of rows of no response
    sums = torch.zeros(places, dtype=torch.float64, device=values_R.device).index_add_(0, ids_R, values_R.double())
    count = torch.zeros_like(sums).index_add_(0, ids_R, live_R.double())
    means_S = (sums / count.clamp(min=1.0))[:-1].float()
    return on_rows(means_S, credit.sequence_ids_R, credit.tokens_per_response, outside=math.nan)
