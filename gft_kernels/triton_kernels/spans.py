"""How a row of V elements at any address is cut so that nearly all of it moves in 16-byte vectors.

    | head | tile | tile | ... | tail | foot |     head, foot: fewer than WIDTH elements each
           ^ 16-byte aligned          ^ 16-byte aligned

WIDTH is the number of elements in 16 bytes. Tiles are full blocks without a mask. The tail is one masked block that
ends a whole number of vectors after its start, so its mask never splits a vector. What is left at both ends is fetched
together, as one small block of `ends`.

V, strides and addresses are run-time values: a kernel is compiled once for all of them, and a vocabulary of 50257,
where seven rows of eight start off a 16-byte boundary, runs the same vector code as one of 50304. The promise
`tl.multiple_of(pointer, 16)` is what makes the compiler emit it; it must stand where the pointer is formed.
"""

import triton
import triton.language as tl


@triton.jit
def row_start(base, row, tokens, outer_stride, inner_stride):
    """Where a row begins, in 64-bit arithmetic: R·V passes 2^31 at 14,135 rows of 151,936."""
    return base + (row // tokens) * outer_stride + (row % tokens) * inner_stride


@triton.jit
def misalignment(pointer):
    """Bytes past the last 16-byte boundary."""
    return (pointer.to(tl.int64) & 15).to(tl.int32)


@triton.jit
def cut(row, V):
    """(head, body): elements before the first boundary, and elements in whole vectors after it."""
    WIDTH: tl.constexpr = 128 // row.dtype.element_ty.primitive_bitwidth
    head = ((16 - misalignment(row)) & 15) * WIDTH // 16
    head = tl.minimum(head, V)
    return head, (V - head) // WIDTH * WIDTH


@triton.jit
def ends(head, body, V, WIDTH: tl.constexpr):
    """Columns of head and foot together, and which of them exist: at most 2·(WIDTH - 1)."""
    lane = tl.arange(0, 2 * WIDTH)
    return tl.where(lane < head, lane, lane + body), lane < V - body
