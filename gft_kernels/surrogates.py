"""What tells one surrogate of the family from another, once for Python: coefficient, kappa and loss of a row.

As in formulas.py the functions use free names only, so that Triton compiles the same text (triton_kernels/formulas.py);
there a name of a surrogate is its place in `options.SURROGATES`. C++ has its own, csrc/gft/formulas.h.
"""

import math

from torch import exp

from gft_kernels.formulas import (
    capped_coefficient,
    clipped_coefficient,
    clipped_loss,
    entropy_coefficient,
    gated_coefficient,
    gated_loss,
    is_clipped,
    kappa,
    log_ratio,
    rectified_coefficient,
    shaped_coefficient,
    shaped_prob,
    token_loss,
    uncertainty,
)
from gft_kernels.options import RECTIFY, SURROGATES, Objective, Rule

GFT, GRPO, CISPO, SAPO, LUFFY, CHORD, EAFT = SURROGATES
ALL = RECTIFY[0]
NAN = float("nan")
WITH_RATIO = (GRPO, CISPO, SAPO)


def surrogate_terms(log_pi, old_log_pi, entropy, advantage, rule):
    """(coefficient, kappa, loss) of rows under one rule, without the penalties.

    coefficient is kappa / A. A loss of the form -A·sg(c)·log pi follows from its coefficient; the others are values
    whose slope the coefficient is.
    """
    ratio = exp(log_ratio(log_pi, old_log_pi))
    coefficient = log_pi * NAN  # of no surrogate
    if rule.surrogate == GFT:
        coefficient = rectified_coefficient(log_pi, advantage, rule.tau, rule.rectify == ALL, rule.gamma)
    elif rule.surrogate == GRPO:
        coefficient = clipped_coefficient(ratio, advantage, rule.clip_low, rule.clip_high, rule.delta)
    elif rule.surrogate == CISPO:
        coefficient = capped_coefficient(ratio, rule.clip_low, rule.clip_high)
    elif rule.surrogate == SAPO:
        coefficient = gated_coefficient(ratio, advantage, rule.gate_positive, rule.gate_negative)
    elif rule.surrogate == LUFFY:
        coefficient = shaped_coefficient(log_pi, rule.gamma)
    elif rule.surrogate == CHORD:
        coefficient = uncertainty(log_pi)
    elif rule.surrogate == EAFT:
        coefficient = entropy_coefficient(entropy, rule.entropy_power)
    k = kappa(advantage, coefficient)
    loss = token_loss(log_pi, k)
    if rule.surrogate == GRPO:
        loss = clipped_loss(ratio, advantage, rule.clip_low, rule.clip_high, rule.delta)
    elif rule.surrogate == SAPO:
        loss = gated_loss(ratio, advantage, rule.gate_positive, rule.gate_negative)
    elif rule.surrogate == LUFFY:
        loss = -kappa(advantage, shaped_prob(log_pi, rule.gamma))
    return coefficient, k, loss


def is_bounded(ratio, advantage, rule: Rule):
    """Whether a bound of the rule holds rho."""
    if rule.surrogate == GRPO:
        return is_clipped(ratio, advantage, rule.clip_low, rule.clip_high, rule.delta)
    if rule.surrogate == CISPO:
        return (ratio > 1.0 + rule.clip_high) | (ratio < 1.0 - rule.clip_low)
    return ratio != ratio


def largest_coefficient(rule: Rule, room: float) -> float:
    """A bound of the coefficient, known ahead of log pi; rho, where A < 0 leaves it free, counts up to `room`."""
    highest = 1.0 + rule.clip_high
    if rule.surrogate == GRPO:
        return min(max(highest, rule.delta), room * highest)
    if rule.surrogate == CISPO:
        return highest
    if rule.surrogate == SAPO:  # rho·sech^2(x / 2) is at most 1 + (2 / gate)·max u·sech^2 u
        return 1.0 + 0.9 / min(rule.gate_positive, rule.gate_negative)
    return 1.0


def largest_pull(objective: Objective, room: float) -> float:
    """The same of what the KL penalty adds to kappa, per unit of beta, which counts up to `room` too."""
    capped = max(1.0, math.expm1(min(objective.kl_cap, math.log1p(room))))
    return {1: 1.0, 2: room, 3: capped}[objective.kl_estimator]
