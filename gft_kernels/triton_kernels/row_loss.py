"""The fused kernel: one program takes one row from its logits to its loss and gradient. Two reads, one write.

Sizes: R rows, V vocabulary. Row r lies at (r // tokens, r % tokens) of the outer dimensions of logits and gradient.
Named tuples are made where they are passed on: one kept in a variable would turn its constants into run-time values.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from gft_kernels.triton_kernels import formulas
from gft_kernels.triton_kernels.formulas import Transform, seen, seen_slope
from gft_kernels.triton_kernels.launch import compiled_once
from gft_kernels.triton_kernels.passes import clear_row, map_row, row_start, row_statistics


class Rule(NamedTuple):
    """options.Rule, as run-time values; names by their place in options.SURROGATES and RECTIFY."""

    surrogate: tl.tensor
    tau: tl.tensor
    rectify: tl.tensor
    clip_low: tl.tensor
    clip_high: tl.tensor
    delta: tl.tensor
    gamma: tl.tensor
    gate_positive: tl.tensor
    gate_negative: tl.tensor
    entropy_power: tl.tensor


class Penalties(NamedTuple):
    """What options.Objective adds to every row's rule."""

    beta: tl.tensor
    kl_cap: tl.tensor
    kl_estimator: tl.tensor
    entropy_coef: tl.tensor
    ref_log_probs_R: tl.tensor


class Known(NamedTuple):
    """All that F7 needs of a row beside its logits. Fields of `Transform` among them."""

    target: tl.tensor
    log_pi: tl.tensor
    top: tl.tensor
    log_mass: tl.tensor
    scale: tl.tensor
    tilt: tl.tensor
    entropy: tl.tensor
    logit_scale: tl.tensor
    temperature: tl.tensor
    SOFTCAP: tl.constexpr
    TILTED: tl.constexpr  # with an entropy bonus


@triton.jit
def dlogit(x, column, row):
    """F7 at some places of a row: x are the logits as stored, `column` says which; row is `Known`."""
    log_pi_v = (seen(x, row) - row.top) - row.log_mass
    slope = seen_slope(x, row)
    if row.TILTED:  # the slope comes last: as a factor of scale and of tilt it would be two more registers an element
        others = formulas.dlogit_tilted(log_pi_v, row.scale, row.tilt, row.entropy)
        at_target = formulas.dlogit_target(row.log_pi, row.scale)
        at_target += formulas.dlogit_tilted(row.log_pi, 0.0, row.tilt, row.entropy)
        return tl.where(column == row.target, at_target, others) * slope
    else:
        others = formulas.dlogit_other(log_pi_v, row.scale * slope)
        return tl.where(column == row.target, formulas.dlogit_target(row.log_pi, row.scale * slope), others)


@triton.jit
def target_logit(row, target, V, transform):
    """(z_y, y): y is -1, a place no column has, where the target lies outside [0, V), and z_y is 0 there."""
    inside = (target >= 0) & (target < V)
    x = tl.load(row + target, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, seen(x, transform), 0.0), tl.where(inside, target, -1).to(tl.int32)


@triton.jit
def row_entropy(z_y, others_top, others_mass, others_gap, top, mass, log_mass):
    """H of the whole row, from the state of the others and the target's logit."""
    anchor = tl.where(top == float("-inf"), 0.0, top)
    gap = formulas.raise_gap(others_gap, others_mass, others_top - anchor)
    gap += formulas.raise_gap(0.0, 1.0, z_y - anchor)
    return formulas.entropy(log_mass, gap / mass)


@triton.jit
def penalised(r, log_pi, h, k, loss, o, ENTROPY: tl.constexpr):
    """kappa and loss of row r with what o, `Penalties`, adds to them."""
    if o.beta != 0.0:
        u = formulas.log_ratio(tl.load(o.ref_log_probs_R + r), log_pi)
        k += o.beta * formulas.kl_kappa(u, o.kl_cap, o.kl_estimator)
        loss += o.beta * formulas.kl_loss(u, o.kl_cap, o.kl_estimator)
    if ENTROPY:
        loss -= tl.where(o.entropy_coef == 0.0, 0.0, o.entropy_coef * h)
    return k, loss


@triton.jit
def split_scales(scale, tilt, h, slope, peak):
    """(scale and tilt an fp16 row is stored with, what backward multiplies it by): the stored row peaks at `peak`."""
    size = formulas.row_size(scale, tilt, h)
    unit = peak / tl.abs(slope)
    stored_scale = tl.where(size == 0.0, 0.0, scale / size * unit)
    stored_tilt = tl.where(size == 0.0, 0.0, tilt / size * unit)
    return stored_scale, stored_tilt, size / unit


@compiled_once
def row_loss_kernel(
    logits,
    gradient,  # logits again, if the gradient is written in place or not wanted
    targets_R,
    live_R,  # uint8
    advantages_R,
    weights_R,
    loss_R,
    log_prob_R,
    coefficient_R,
    entropy_R,
    row_scale_R,
    given_R,  # uint8
    old_log_probs_R,
    ref_log_probs_R,
    tokens: tl.int64,
    V: tl.int64,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    gradient_outer_stride: tl.int64,
    gradient_inner_stride: tl.int64,
    surrogate: tl.int32,
    tau: tl.float32,
    rectify: tl.int32,
    clip_low: tl.float32,
    clip_high: tl.float32,
    delta: tl.float32,
    gamma: tl.float32,
    gate_positive: tl.float32,
    gate_negative: tl.float32,
    entropy_power: tl.float32,
    given_surrogate: tl.int32,
    given_tau: tl.float32,
    given_rectify: tl.int32,
    given_clip_low: tl.float32,
    given_clip_high: tl.float32,
    given_delta: tl.float32,
    given_gamma: tl.float32,
    given_gate_positive: tl.float32,
    given_gate_negative: tl.float32,
    given_entropy_power: tl.float32,
    beta: tl.float32,
    kl_cap: tl.float32,
    kl_estimator: tl.int32,
    entropy_coef: tl.float32,
    has_given: tl.int32,  # 0: no row is under the given rule
    has_old: tl.int32,  # 0: on-policy
    logit_scale: tl.float32,
    temperature: tl.float32,
    peak: tl.float32,  # 0: the gradient is stored as it is
    read_all: tl.int32,  # live rows that the loss has no use for are read as well
    want_gradient: tl.int32,
    SOFTCAP: tl.constexpr,  # a property of the model, so compiled in; 0: none
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    row = row_start(logits, r, tokens, outer_stride, inner_stride)
    into = row_start(gradient, r, tokens, gradient_outer_stride, gradient_inner_stride)
    width = V.to(tl.int32)
    advantage, weight = tl.load(advantages_R + r), tl.load(weights_R + r)
    acts = (weight != 0.0) & ((advantage != 0.0) | (beta != 0.0) | (entropy_coef != 0.0))
    # zeros for a row that is not read; the branch below overwrites them
    loss, log_pi, c, h, scale, tilt = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    top, log_mass, y = 0.0, 0.0, -1
    if (tl.load(live_R + r) != 0) & (acts | (read_all != 0)):
        z_y, y = target_logit(row, tl.load(targets_R + r), V, Transform(logit_scale, temperature, SOFTCAP))
        others_top, others_mass, others_gap = row_statistics(
            row, width, y, Transform(logit_scale, temperature, SOFTCAP), ENTROPY, BLOCK
        )
        z_y = tl.where(y < 0, float("nan"), z_y)  # a target out of range spoils its row, without a host sync
        log_pi = formulas.log_prob(z_y, others_top, others_mass)
        top, mass = formulas.observe(others_top, others_mass, z_y)
        log_mass = formulas.log(mass)
        if ENTROPY:
            # Of a certain target: log pi has digits that the sum lost, and F7 adds it to an H made of this.
            log_mass = tl.where(z_y == top, -log_pi, log_mass)
            h = row_entropy(z_y, others_top, others_mass, others_gap, top, mass, log_mass)
        given, old_log_pi = has_given != 0, log_pi
        if given:
            given = tl.load(given_R + r) != 0
        if has_old != 0:
            old_log_pi = tl.load(old_log_probs_R + r)
        c, k, loss = formulas.surrogate_terms(
            log_pi, old_log_pi, h, advantage,
            Rule(
                tl.where(given, given_surrogate, surrogate),
                tl.where(given, given_tau, tau),
                tl.where(given, given_rectify, rectify),
                tl.where(given, given_clip_low, clip_low),
                tl.where(given, given_clip_high, clip_high),
                tl.where(given, given_delta, delta),
                tl.where(given, given_gamma, gamma),
                tl.where(given, given_gate_positive, gate_positive),
                tl.where(given, given_gate_negative, gate_negative),
                tl.where(given, given_entropy_power, entropy_power),
            ),
        )  # fmt: skip
        penalties = Penalties(beta, kl_cap, kl_estimator, entropy_coef, ref_log_probs_R)
        k, loss = penalised(r, log_pi, h, k, loss, penalties, ENTROPY)
        loss, scale = formulas.weighed(weight, loss), formulas.weighed(weight, k)
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
            map_row(
                row, into, width, dlogit,
                Known(y, log_pi, top, log_mass, scale, tilt, h, logit_scale, temperature, SOFTCAP, ENTROPY), BLOCK,
            )  # fmt: skip
