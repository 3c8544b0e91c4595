"""The backward's one multiplication: gradient·row_scale·upstream, read on the device and rounded once."""

import triton
import triton.language as tl

from gft_kernels.triton_kernels.launch import compiled_once
from gft_kernels.triton_kernels.passes import map_row, row_start


@triton.jit
def times(x, column, factor):
    return x * factor


@compiled_once
def scale_rows_kernel(
    gradient,
    scaled,  # gradient again, if in place
    row_scale_R,
    upstream,  # one number, or one per row
    tokens: tl.int64,
    V: tl.int64,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    scaled_outer_stride: tl.int64,
    scaled_inner_stride: tl.int64,
    upstream_stride: tl.int64,  # 0: one number for all rows
    has_row_scale: tl.int32,
    in_place: tl.int32,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    factor = tl.load(upstream + r * upstream_stride).to(tl.float32)
    if has_row_scale != 0:
        factor *= tl.load(row_scale_R + r)
    row = row_start(gradient, r, tokens, outer_stride, inner_stride)
    into = row_start(scaled, r, tokens, scaled_outer_stride, scaled_inner_stride)
    if (factor != 1.0) | (in_place == 0):  # loss.backward() in place moves no byte; the host never sees the factor
        map_row(row, into, V.to(tl.int32), times, factor, BLOCK)
