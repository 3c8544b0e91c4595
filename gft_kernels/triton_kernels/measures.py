"""What the linear loss's sparse products ask of a gradient G of logits: the size of each row, sums over groups of rows.

Each is one look at every entry, and G is copied nowhere. Its rows begin at multiples of 16 bytes, as those of the
linear loss's buffer do, so unlike in passes.py there is nothing before the first vector.

Sizes: R rows, V vocabulary, N groups; BLOCK elements of a tile, WIDTH of a 16-byte vector, LANES = BLOCK / WIDTH.
"""

import triton
import triton.language as tl

from gft_kernels.triton_kernels.launch import compiled_once


@triton.jit
def observe(top, total, square, x):
    """LANES running states (largest size, sum, squares in units of the largest) and WIDTH entries more for each."""
    larger = tl.maximum(top, tl.max(tl.abs(x), 1))
    unit = tl.where(larger > 0.0, 1.0 / larger, 0.0)
    moved, scaled = top * unit, x * unit[:, None]
    return larger, total + tl.sum(x, 1), square * moved * moved + tl.sum(scaled * scaled, 1)


@compiled_once
def row_sizes_kernel(gradient, top_R, sum_R, square_R, V: tl.int64, stride: tl.int64, BLOCK: tl.constexpr):
    """Of each row the size of its largest entry, and in units of that its sum and its sum of squares."""
    WIDTH: tl.constexpr = 128 // gradient.dtype.element_ty.primitive_bitwidth
    LANES: tl.constexpr = BLOCK // WIDTH
    r = tl.program_id(0).to(tl.int64)
    row, width, column = gradient + r * stride, V.to(tl.int32), tl.arange(0, BLOCK)
    whole = width // BLOCK * BLOCK
    top = tl.zeros((LANES,), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    square = tl.zeros((LANES,), tl.float32)
    start = 0
    while start < whole:
        x = tl.load(tl.multiple_of(row + start, 16) + column).to(tl.float32)
        top, total, square = observe(top, total, square, tl.reshape(x, (LANES, WIDTH)))
        start += BLOCK
    if whole < width:
        x = tl.load(tl.multiple_of(row + whole, 16) + column, mask=column < width - whole, other=0.0).to(tl.float32)
        top, total, square = observe(top, total, square, tl.reshape(x, (LANES, WIDTH)))
    row_top = tl.max(top, 0)
    unit = tl.where(row_top > 0.0, 1.0 / row_top, 0.0)
    moved = top * unit
    tl.store(top_R + r, row_top)
    tl.store(sum_R + r, tl.sum(total, 0) * unit)
    tl.store(square_R + r, tl.sum(square * moved * moved, 0))


@compiled_once
def group_sums_kernel(
    gradient,
    factor_R,
    sum_NV,
    rows: tl.int64,
    group: tl.int64,  # rows of a sum; of the last one, what is left
    V: tl.int64,
    stride: tl.int64,
    SQUARED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """sum[n] = Σ factor·G over the rows of group n, or Σ (factor·G)²: BLOCK columns of it a program."""
    n, first = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * BLOCK
    column = tl.arange(0, BLOCK)
    row, last = n * group, tl.minimum((n + 1) * group, rows)
    inside = column < V - first
    if first + BLOCK <= V:
        total = sum_rows(gradient + first, factor_R, row, last, stride, inside, SQUARED, True, BLOCK, ROWS)
    else:
        total = sum_rows(gradient + first, factor_R, row, last, stride, inside, SQUARED, False, BLOCK, ROWS)
    tl.store(sum_NV + n * V + first + column, total, mask=inside)


@triton.jit
def sum_rows(
    columns, factor_R, row, last, stride, inside,
    SQUARED: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program's sums over rows [row, last), ROWS at a time, so that as many loads are under way."""
    total = tl.zeros((BLOCK,), tl.float32)
    while row < last:
        r = row + tl.arange(0, ROWS)
        there = r < last
        factor = tl.load(factor_R + r, mask=there, other=0.0)
        starts = tl.multiple_of(columns + r * stride, 16)
        read = there[:, None] if WHOLE else there[:, None] & inside[None, :]
        x = tl.load(starts[:, None] + tl.arange(0, BLOCK)[None, :], mask=read, other=0.0).to(tl.float32)
        x *= factor[:, None]
        if SQUARED:
            x *= x
        total += tl.sum(x, 0)
        row += ROWS
    return total
