"""The fused kernel: one program takes one row from its logits to its loss and gradient. Two reads, one write.

Sizes: R rows, V vocabulary. Row r lies at (r // tokens, r % tokens) of the outer dimensions of logits and gradient.
"""

import triton
import triton.language as tl

from gft_kernels.triton_kernels.formulas import (
    capped_coefficient,
    clipped_coefficient,
    clipped_loss,
    coefficient,
    dlogit_other,
    dlogit_target,
    dlogit_tilted,
    entropy,
    exp,
    kappa,
    kl_kappa,
    kl_loss,
    log,
    log_prob,
    log_ratio,
    observe,
    raise_gap,
    row_size,
    row_tau,
    seen,
    seen_slope,
    token_loss,
)
from gft_kernels.triton_kernels.spans import row_start
from gft_kernels.triton_kernels.specialisation import compiled_once
from gft_kernels.triton_kernels.sweeps import clear_row, map_row, row_statistics

# Surrogates by their place in options.SURROGATES; run-time values, so that no objective is compiled of its own.
GFT = tl.constexpr(0)
GRPO = tl.constexpr(1)


@triton.jit
def dlogit(x, column, parameters):
    """F7 at some places of a row: x are the logits as stored, `column` says which. TILTED: with an entropy bonus."""
    target, log_pi, top, log_mass, scale, tilt, h, logit_scale, temperature = parameters[:9]
    SOFTCAP: tl.constexpr = parameters[9]
    TILTED: tl.constexpr = parameters[10]
    z = seen(x, logit_scale, temperature, SOFTCAP)
    slope = seen_slope(x, logit_scale, temperature, SOFTCAP)
    if TILTED:  # the slope comes last: as a factor of scale and of tilt it would be two more registers an element
        others = dlogit_tilted((z - top) - log_mass, scale, tilt, h)
        at_target = dlogit_target(log_pi, scale) + dlogit_tilted(log_pi, 0.0, tilt, h)
        return tl.where(column == target, at_target, others) * slope
    else:
        others = dlogit_other((z - top) - log_mass, scale * slope)
        return tl.where(column == target, dlogit_target(log_pi, scale * slope), others)


@triton.jit
def target_logit(row, target, V, logit_scale, temperature, SOFTCAP: tl.constexpr):
    """(z_y, y): y is -1, a place no column has, where the target lies outside [0, V), and z_y is 0 there."""
    inside = (target >= 0) & (target < V)
    x = tl.load(row + target, mask=inside, other=0.0).to(tl.float32)
    z = seen(x, logit_scale, temperature, SOFTCAP)
    return tl.where(inside, z, 0.0), tl.where(inside, target, -1).to(tl.int32)


@triton.jit
def row_entropy(z_y, others_top, others_mass, others_gap, top, mass):
    """H of the whole row, from the state of the others and the target's logit."""
    anchor = tl.where(top == float("-inf"), 0.0, top)
    gap = raise_gap(others_gap, others_mass, others_top - anchor) + raise_gap(0.0, 1.0, z_y - anchor)
    return entropy(log(mass), gap / mass)


@triton.jit
def row_terms(
    r, log_pi, h, advantage, tau, rectify_all, surrogate, old_log_probs_R, has_old, ref_log_probs_R, clip_low,
    clip_high, delta, beta, kl_cap, entropy_coef, ENTROPY: tl.constexpr,
):  # fmt: skip
    """F4, kappa and F6 of row r: the only place here that knows one objective from another."""
    if surrogate == GFT:
        c = coefficient(log_pi, row_tau(advantage, tau, rectify_all != 0))
        k = kappa(advantage, c)
        loss = token_loss(log_pi, k)
    else:
        old_log_pi = log_pi
        if has_old != 0:
            old_log_pi = tl.load(old_log_probs_R + r)
        ratio = exp(log_ratio(log_pi, old_log_pi))
        if surrogate == GRPO:
            c = clipped_coefficient(ratio, advantage, clip_low, clip_high, delta)
            k = kappa(advantage, c)
            loss = clipped_loss(ratio, advantage, clip_low, clip_high, delta)
        else:
            c = capped_coefficient(ratio, clip_high)
            k = kappa(advantage, c)
            loss = token_loss(log_pi, k)
    if beta != 0.0:
        u = log_ratio(tl.load(ref_log_probs_R + r), log_pi)
        k += beta * kl_kappa(u, kl_cap)
        loss += beta * kl_loss(u, kl_cap)
    if ENTROPY:
        loss -= tl.where(entropy_coef == 0.0, 0.0, entropy_coef * h)
    return c, k, loss


@triton.jit
def split_scales(scale, tilt, h, slope, peak):
    """(scale and tilt an fp16 row is stored with, what backward multiplies it by): the stored row peaks at `peak`."""
    size = row_size(scale, tilt, h)
    unit = peak / tl.abs(slope)
    stored_scale = tl.where(size == 0.0, 0.0, scale / size * unit)
    stored_tilt = tl.where(size == 0.0, 0.0, tilt / size * unit)
    return stored_scale, stored_tilt, size / unit


@compiled_once
def row_loss_kernel(
    logits,
    gradient,  # logits again, if the gradient is written in place or not wanted
    targets_R,
    advantages_R,
    weights_R,
    read_R,  # uint8: 0 on rows that need no logits (masked, or A = 0 and no statistics wanted)
    loss_R,
    log_prob_R,
    coefficient_R,
    entropy_R,
    row_scale_R,
    old_log_probs_R,
    ref_log_probs_R,
    tokens: tl.int64,
    V: tl.int64,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    gradient_outer_stride: tl.int64,
    gradient_inner_stride: tl.int64,
    tau: tl.float32,
    rectify_all: tl.int32,
    surrogate: tl.int32,
    has_old: tl.int32,  # 0: on-policy
    clip_low: tl.float32,
    clip_high: tl.float32,
    delta: tl.float32,
    beta: tl.float32,
    kl_cap: tl.float32,
    entropy_coef: tl.float32,
    logit_scale: tl.float32,
    temperature: tl.float32,
    peak: tl.float32,  # 0: the gradient is stored as it is
    want_gradient: tl.int32,
    SOFTCAP: tl.constexpr,  # a property of the model, so compiled in; 0: none
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    row = row_start(logits, r, tokens, outer_stride, inner_stride)
    into = row_start(gradient, r, tokens, gradient_outer_stride, gradient_inner_stride)
    width = V.to(tl.int32)
    read = tl.load(read_R + r) != 0
    # zeros for a row that is not read; the branch below overwrites them
    loss, log_pi, c, h, scale, tilt, row_scale = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    top, log_mass, y = 0.0, 0.0, -1
    if read:
        z_y, y = target_logit(row, tl.load(targets_R + r), V, logit_scale, temperature, SOFTCAP)
        others_top, others_mass, others_gap = row_statistics(
            row, width, y, logit_scale, temperature, SOFTCAP, ENTROPY, BLOCK
        )
        z_y = tl.where(y < 0, float("nan"), z_y)  # a target out of range spoils its row, without a host sync
        log_pi = log_prob(z_y, others_top, others_mass)
        top, mass = observe(others_top, others_mass, z_y)
        log_mass = log(mass)
        if ENTROPY:
            h = row_entropy(z_y, others_top, others_mass, others_gap, top, mass)
        advantage = tl.load(advantages_R + r)
        weight = tl.load(weights_R + r)
        c, k, loss = row_terms(
            r, log_pi, h, advantage, tau, rectify_all, surrogate, old_log_probs_R, has_old, ref_log_probs_R, clip_low,
            clip_high, delta, beta, kl_cap, entropy_coef, ENTROPY,
        )  # fmt: skip
        loss = tl.where(loss == 0.0, 0.0, weight * loss)
        scale = tl.where(k == 0.0, 0.0, weight * k)
        if ENTROPY:
            tilt = weight * entropy_coef
        if peak > 0.0:
            scale, tilt, row_scale = split_scales(scale, tilt, h, logit_scale / temperature, peak)
            tl.store(row_scale_R + r, row_scale)
    elif peak > 0.0:
        tl.store(row_scale_R + r, 0.0)
    tl.store(loss_R + r, loss)
    tl.store(log_prob_R + r, log_pi)
    tl.store(coefficient_R + r, c)
    if ENTROPY:
        tl.store(entropy_R + r, h)
    if want_gradient != 0:
        if (scale == 0.0) & (tilt == 0.0):
            clear_row(into, width, BLOCK)
        else:
            # In place, the target's logit and every statistic must be in registers before the first store.
            tl.debug_barrier()
            # (The tuple stands in the call: as a variable it would turn its constants into run-time values.)
            map_row(
                row, into, width, dlogit,
                (y, log_pi, top, log_mass, scale, tilt, h, logit_scale, temperature, SOFTCAP, ENTROPY), BLOCK,
            )  # fmt: skip
