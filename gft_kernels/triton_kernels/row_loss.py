"""The fused kernel: one program takes one row from its logits to its loss and gradient. Two reads, one write.

Sizes: R rows, V vocabulary. Row r lies at (r // tokens, r % tokens) of the outer dimensions of logits and gradient.
"""

import triton
import triton.language as tl

from gft_kernels.triton_kernels.formulas import (
    coefficient,
    dlogit_other,
    dlogit_target,
    entropy,
    kappa,
    log,
    log_prob,
    observe,
    raise_gap,
    row_tau,
    seen,
    seen_slope,
    token_loss,
)
from gft_kernels.triton_kernels.spans import row_start
from gft_kernels.triton_kernels.specialisation import compiled_once
from gft_kernels.triton_kernels.sweeps import clear_row, map_row, row_statistics


@triton.jit
def dlogit(x, column, parameters):
    """F7 at some places of a row: x are the logits as stored, `column` says which."""
    target, log_pi, top, log_mass, scale, logit_scale, temperature = parameters[:7]
    SOFTCAP: tl.constexpr = parameters[7]
    z = seen(x, logit_scale, temperature, SOFTCAP)
    scale = scale * seen_slope(x, logit_scale, temperature, SOFTCAP)
    others = dlogit_other((z - top) - log_mass, scale)
    return tl.where(column == target, dlogit_target(log_pi, scale), others)


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
def split_scale(scale, slope, peak):
    """(what an fp16 row is stored with, what the backward multiplies it by): the stored row peaks at `peak`."""
    sloped = scale * slope
    stored = tl.where(sloped < 0.0, -peak, peak) / slope
    return tl.where(scale == 0.0, 0.0, stored), tl.abs(sloped) / peak


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
    tokens: tl.int64,
    V: tl.int64,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    gradient_outer_stride: tl.int64,
    gradient_inner_stride: tl.int64,
    tau: tl.float32,
    rectify_all: tl.int32,
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
    loss, log_pi, c, h, scale, row_scale = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
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
        c = coefficient(log_pi, row_tau(advantage, tau, rectify_all != 0))
        k = kappa(advantage, c)
        loss = tl.where(k == 0.0, 0.0, weight * token_loss(log_pi, k))
        scale = tl.where(k == 0.0, 0.0, weight * k)
        if peak > 0.0:
            scale, row_scale = split_scale(scale, logit_scale / temperature, peak)
            tl.store(row_scale_R + r, row_scale)
    elif peak > 0.0:
        tl.store(row_scale_R + r, 0.0)
    tl.store(loss_R + r, loss)
    tl.store(log_prob_R + r, log_pi)
    tl.store(coefficient_R + r, c)
    if ENTROPY:
        tl.store(entropy_R + r, h)
    if want_gradient != 0:
        if scale == 0.0:
            clear_row(into, width, BLOCK)
        else:
            # In place, the target's logit and every statistic must be in registers before the first store.
            tl.debug_barrier()
            # (The tuple stands in the call: as a variable it would turn SOFTCAP into a run-time value.)
            map_row(
                row, into, width, dlogit, (y, log_pi, top, log_mass, scale, logit_scale, temperature, SOFTCAP), BLOCK
            )
