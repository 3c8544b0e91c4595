"""The mathematics of GFT and its family, F1 to F7, once for Python. Derivations: docs/formulas.md.

Every function is elementwise, takes tensors (or blocks) that broadcast, and uses only the free names imported
below, so that another array language can run the very same text by binding those names to its own operations.

Units: logits and log-probabilities are in nats.
"""

from torch import abs, exp, expm1, log, log1p, maximum, tanh, where

NEG_INF = float("-inf")


def transform(logit, logit_scale, softcap, temperature):
    """The logit the loss sees: scale, then softcap c·tanh(z/c) (softcap 0: none), then divide by the temperature."""
    scaled = logit * logit_scale
    if softcap != 0.0:
        scaled = softcap * tanh(scaled / softcap)
    return scaled / temperature


def transform_slope(logit, logit_scale, softcap, temperature):
    """d transform / d logit, the chain rule's factor in F7.

    With a softcap, 1 - tanh^2 is formed as 4e / (1 + e)^2, e = exp(-2|x|): near saturation a difference has no digits.
    """
    slope = logit_scale / temperature
    if softcap != 0.0:
        decay = exp(-2.0 * abs(logit * logit_scale / softcap))
        slope = slope * 4.0 * decay / ((1.0 + decay) * (1.0 + decay))
    return slope


def observe(top, mass, logit):
    """F1: the running state (top, mass) after one more logit; mass counts in units of e^top."""
    return merge(top, mass, logit, 1.0)


def merge(top_a, mass_a, top_b, mass_b):
    """F2: two states into one. A commutative monoid with neutral element (-inf, 0)."""
    top = maximum(top_a, top_b)
    anchor = where(top == NEG_INF, 0.0, top)  # both empty: e^(-inf - 0) = 0, not NaN
    return top, mass_a * exp(top_a - anchor) + mass_b * exp(top_b - anchor)


def raise_gap(gap, mass, drop):
    """The sum of e^(z - top)·(z - top), what entropy needs, after the top has risen; drop = old top - new top <= 0."""
    share = exp(drop)
    return where(share == 0.0, 0.0, share * (gap + mass * drop))  # an empty state or a banned token: drop = -inf


def log_prob(target_logit, others_top, others_mass):
    """F3: log pi = -softplus(d), d = (top - z_y) + log mass over the other tokens' state.

    The target is kept out of the running state: added to it, its 1 would swallow the digits that pi near 1 lives on.
    A common offset cancels in top - z_y first. A target of +inf is an overflow, not a certainty: NaN.
    """
    d = (others_top - target_logit) + log(others_mass)
    log_pi = -(where(d > 0.0, d, 0.0) + log1p(exp(-abs(d))))
    return where(target_logit == -NEG_INF, NEG_INF - NEG_INF, log_pi)


def row_tau(advantage, tau, rectify_all):
    """The threshold of a row: rectify="positive" spares rows with A <= 0, which is tau = 0 there."""
    return where((advantage > 0.0) | rectify_all, tau, 0.0)


def coefficient(log_pi, tau):
    """F4: C(pi) = pi if pi < tau else 1 (detached). tau = 0 is SFT, tau = 1 is DFT; a NaN stays a NaN."""
    return where(log_pi >= log(tau), 1.0, exp(log_pi))


def shaped_prob(log_pi, gamma):
    """pi / (pi + gamma), which bounds a push away from rare tokens: 1 where gamma = 0, and else 0 where pi = 0.

    Formed from e^-log pi, of which float32 holds 85 nats.
    """
    shaped = 1.0 / (1.0 + gamma * exp(where(log_pi < -85.0, 85.0, -log_pi)))
    return where((log_pi == NEG_INF) & (gamma > 0.0), 0.0, shaped)


def rectified_coefficient(log_pi, advantage, tau, rectify_all, gamma):
    """F4 of gft with its choices: C(pi) where A > 0, or everywhere; elsewhere 1 (gamma = 0), or pi / (pi + gamma)."""
    bounded = where((advantage > 0.0) | rectify_all, 0.0, gamma)
    c = coefficient(log_pi, row_tau(advantage, tau, rectify_all))
    return where(bounded > 0.0, shaped_prob(log_pi, bounded), c)


def shaped_coefficient(log_pi, gamma):
    """F4 of luffy, the slope of pi / (pi + gamma) by log pi: gamma·pi / (pi + gamma)^2."""
    shaped = shaped_prob(log_pi, gamma)
    return shaped * (1.0 - shaped)


def uncertainty(log_pi):
    """F4 of chord: phi = pi·(1 - pi), the variance of the token."""
    return -exp(log_pi) * expm1(log_pi)


def entropy_coefficient(entropy, power):
    """F4 of eaft: (H / log 20)^power, at most 1. log 20 is the entropy of 20 tokens alike, the paper's measure."""
    share = entropy / 2.995732273553991
    return where(share > 1.0, 1.0, exp(power * log(share)))


def group_advantage(reward, mean, std, eps):
    """F5: A = (R - mean) / (std + eps), exactly 0 where the group has no spread, or one that rounds to 0."""
    return where(std == 0.0, 0.0, (reward - mean) / (std + eps))


def log_ratio(log_a, log_b):
    """log(a / b), 0 where they are equal, also where both are 0."""
    return where(log_a == log_b, 0.0, log_a - log_b)


def is_clipped(ratio, advantage, clip_low, clip_high, delta):
    """Whether a bound holds rho: A would push it further out, or A < 0 and rho > delta. At a bound itself it does not.

    delta, the dual clip, is beyond 1 + clip_high; inf: none.
    """
    above = (advantage > 0.0) & (ratio > 1.0 + clip_high)
    return above | ((advantage < 0.0) & ((ratio < 1.0 - clip_low) | (ratio > delta)))


def clipped_coefficient(ratio, advantage, clip_low, clip_high, delta):
    """F4 of grpo: rho, 0 where a bound holds it."""
    return where(is_clipped(ratio, advantage, clip_low, clip_high, delta), 0.0, ratio)


def clipped_loss(ratio, advantage, clip_low, clip_high, delta):
    """F6 of grpo: -min(min(rho, delta)·A, clip(rho)·A), exactly 0 where A = 0."""
    bound = where(advantage > 0.0, 1.0 + clip_high, where(ratio > 1.0, delta, 1.0 - clip_low))
    bounded = where(is_clipped(ratio, advantage, clip_low, clip_high, delta), bound, ratio)
    return where(advantage == 0.0, 0.0, -advantage * bounded)


def capped_coefficient(ratio, clip_low, clip_high):
    """F4 of cispo: rho held in [1 - clip_low, 1 + clip_high]; a NaN stays a NaN."""
    capped = where(ratio > 1.0 + clip_high, 1.0 + clip_high, ratio)
    return where(capped < 1.0 - clip_low, 1.0 - clip_low, capped)


def gated_coefficient(ratio, advantage, gate_positive, gate_negative):
    """F4 of sapo: rho·4s(1 - s), s = 1 / (1 + e^-x), x = gate·(rho - 1); 0 where the gate is shut, at rho = inf too."""
    apart = ratio - 1.0
    decay = exp(-abs(where(advantage > 0.0, gate_positive * apart, gate_negative * apart)))
    return where(decay == 0.0, 0.0, ratio * (4.0 * decay / ((1.0 + decay) * (1.0 + decay))))


def gated_loss(ratio, advantage, gate_positive, gate_negative):
    """F6 of sapo: -A·(4 / gate)·s, exactly 0 where A = 0."""
    apart = ratio - 1.0
    per_gate = where(advantage > 0.0, advantage / gate_positive, advantage / gate_negative)
    rest = exp(where(advantage > 0.0, -gate_positive * apart, -gate_negative * apart))
    return where(advantage == 0.0, 0.0, -4.0 * per_gate / (1.0 + rest))


def kl_kappa(u, kl_cap, estimator):
    """What an estimate of the KL adds to kappa, per unit of its weight: its slope by u, held at u = kl_cap."""
    held = where(u > kl_cap, kl_cap, u)
    slope = expm1(held)
    if estimator == 1:
        slope = where(held == held, -1.0, held)
    elif estimator == 2:
        slope = held
    return slope


def kl_loss(u, kl_cap, estimator):
    """An estimate of KL(pi, pi_ref) at one token, u = log pi_ref - log pi: k1 = -u, k2 = u^2 / 2, k3 = e^u - 1 - u.

    `estimator` is its number. Beyond u = kl_cap its tangent there goes on; inf: the estimate itself everywhere.
    """
    held, slope = where(u > kl_cap, kl_cap, u), kl_kappa(u, kl_cap, estimator)
    value = where(held == -NEG_INF, held, slope - held)  # +inf there, not inf - inf
    if estimator == 1:
        value = -held
    elif estimator == 2:
        value = 0.5 * held * held
    return value + where(u > kl_cap, slope * (u - held), 0.0)


def kappa(advantage, coefficient):
    """The row coefficient of the gradient, A·C(pi): all that tells one objective of the family from another."""
    return where(advantage == 0.0, 0.0, advantage * coefficient)


def token_loss(log_pi, kappa):
    """F6: loss = -kappa·log pi, 0 where kappa = 0 (the limit of pi·log pi, never 0·inf)."""
    return where(kappa == 0.0, 0.0, -kappa * log_pi)


def weighed(weight, value):
    """value times weight; 0 where the weight is, whatever the value: a row that is out cannot spoil the sum."""
    return where(weight == 0.0, 0.0, weight * value)


def dlogit_other(log_pi_v, scale):
    """F7 away from the target: scale·pi_v, with scale = weight·kappa; exactly 0 where scale = 0."""
    return where(scale == 0.0, 0.0, scale * exp(log_pi_v))


def dlogit_target(log_pi_y, scale):
    """F7 at the target: scale·(pi_y - 1), formed by expm1 so that pi near 1 keeps its digits."""
    return where(scale == 0.0, 0.0, scale * expm1(log_pi_y))


def dlogit_tilted(log_pi_v, scale, tilt, entropy):
    """F7 away from the target with -lambda·H in the loss: pi_v·(scale + tilt·(log pi_v + H)), tilt = weight·lambda.

    0 where pi_v = 0, never 0·inf. At the target the same with scale = 0 is added to what F7 is there.
    """
    pi_v = exp(log_pi_v)
    return where(pi_v == 0.0, 0.0, pi_v * (scale + tilt * (log_pi_v + entropy)))


def row_size(scale, tilt, entropy):
    """A bound of a row's F7: |pi_v - 1| <= 1, and -1 < pi_v·(log pi_v + H) <= H."""
    return abs(scale) + where(tilt == 0.0, 0.0, abs(tilt) * (1.0 + entropy))


def entropy(log_mass, mean_gap):
    """H = log mass - E[z - top] >= 0, in nats; mean_gap is that expectation, mass the whole row's, target included."""
    h = log_mass - mean_gap
    return where(h < 0.0, 0.0, h)  # a rounding below 0 is 0; a NaN stays a NaN
