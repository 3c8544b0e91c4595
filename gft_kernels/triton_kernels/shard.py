"""The two halves of the row kernel for logits sharded over the vocabulary, with a collective between them.

Each rank reduces its columns to a state; the states are merged (F2) across ranks; each rank then writes its columns of
the gradient from the row's common numbers. Targets here are columns of the shard; a target that lies in another
shard is any number outside [0, V), V being the shard's width.
"""

import triton.language as tl

from gft_kernels.triton_kernels.formulas import NEG_INF, Transform
from gft_kernels.triton_kernels.launch import compiled_once
from gft_kernels.triton_kernels.passes import clear_row, map_row, row_start, row_statistics
from gft_kernels.triton_kernels.row_loss import Known, dlogit, target_logit


@compiled_once
def shard_statistics_kernel(
    logits,
    targets_R,
    read_R,  # uint8: 0 gives the neutral state (-inf, 0), gap 0 and target logit 0
    top_R,
    mass_R,
    gap_R,
    target_logit_R,  # 0 where the target is in another shard: the sum over ranks is the target's logit
    tokens: tl.int64,
    V: tl.int64,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    logit_scale: tl.float32,
    temperature: tl.float32,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    top, mass, gap, z_y = NEG_INF, 0.0, 0.0, 0.0
    if tl.load(read_R + r) != 0:
        row = row_start(logits, r, tokens, outer_stride, inner_stride)
        z_y, y = target_logit(row, tl.load(targets_R + r), V, Transform(logit_scale, temperature, SOFTCAP))
        top, mass, gap = row_statistics(
            row, V.to(tl.int32), y, Transform(logit_scale, temperature, SOFTCAP), ENTROPY, BLOCK
        )
    tl.store(top_R + r, top)
    tl.store(mass_R + r, mass)
    tl.store(target_logit_R + r, z_y)
    if ENTROPY:
        tl.store(gap_R + r, gap)


@compiled_once
def shard_gradient_kernel(
    logits,
    gradient,  # logits again, if in place
    targets_R,
    log_pi_R,
    top_R,
    log_mass_R,
    scale_R,
    tilt_R,
    entropy_R,
    tokens: tl.int64,
    V: tl.int64,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    gradient_outer_stride: tl.int64,
    gradient_inner_stride: tl.int64,
    logit_scale: tl.float32,
    temperature: tl.float32,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,  # with an entropy bonus; without one tilt_R and entropy_R are not read
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    row = row_start(logits, r, tokens, outer_stride, inner_stride)
    into = row_start(gradient, r, tokens, gradient_outer_stride, gradient_inner_stride)
    width = V.to(tl.int32)
    scale, tilt, h = tl.load(scale_R + r), 0.0, 0.0
    if ENTROPY:
        tilt, h = tl.load(tilt_R + r), tl.load(entropy_R + r)
    if (scale == 0.0) & (tilt == 0.0):
        clear_row(into, width, BLOCK)
    else:
        target = tl.load(targets_R + r)
        y = tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)
        log_pi = tl.load(log_pi_R + r)
        top = tl.load(top_R + r)
        log_mass = tl.load(log_mass_R + r)
        map_row(
            row, into, width, dlogit,
            Known(y, log_pi, top, log_mass, scale, tilt, h, logit_scale, temperature, SOFTCAP, ENTROPY), BLOCK,
        )  # fmt: skip
