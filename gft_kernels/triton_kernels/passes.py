"""The passes over one row: its statistics (F1, F2), and a map of its elements into a second row (F7, scaling, zeros).

A row of V elements at any address is cut so that nearly all of it moves in 16-byte vectors:

    | head | tile | tile | ... | tail | foot |     head, foot: fewer than WIDTH elements each
           ^ 16-byte aligned          ^ 16-byte aligned

WIDTH is the number of elements in 16 bytes. Tiles are full blocks without a mask. The tail is one masked block that
ends a whole number of vectors after its start, so its mask never splits a vector. What is left at both ends is fetched
together, as one small block of `ends`.

V, strides and addresses are run-time values: a kernel is compiled once for all of them, and a vocabulary of 50257,
where seven rows of eight start off a 16-byte boundary, runs the same vector code as one of 50304. The promise
`tl.multiple_of(pointer, 16)` is what makes the compiler emit it; it must stand where the pointer is formed.

Sizes: V vocabulary, BLOCK elements of a tile, WIDTH elements of a 16-byte vector, LANES = BLOCK / WIDTH.
Loops are `while`: Triton's interpreter turns run-time `range` bounds into Python integers in a way NumPy 2.4 refuses.
"""

import triton
import triton.language as tl

from gft_kernels.triton_kernels.formulas import NEG_INF, exp, merge, raise_gap, seen


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


@triton.jit
def observe_vectors(top, mass, gap, z, ENTROPY: tl.constexpr):
    """F1 for LANES running states and WIDTH new logits each: z is (LANES, WIDTH).

    One exponential a logit; moving a state to its new top costs two a lane, and both a lane's logits and its state
    live in one thread's registers.
    """
    new_top, moved = merge(top, mass, tl.max(z, 1), 0.0)
    anchor = tl.where(new_top == NEG_INF, 0.0, new_top)  # as in merge: no NaN from -inf - -inf
    drop = z - anchor[:, None]
    if ENTROPY:
        gap = raise_gap(gap, mass, top - anchor) + tl.sum(raise_gap(0.0, 1.0, drop), 1)
    return new_top, moved + tl.sum(exp(drop), 1), gap


@triton.jit
def row_statistics(row, V, target, transform, ENTROPY: tl.constexpr, BLOCK: tl.constexpr):
    """F1 and F2 over a row without its target: (top, mass, gap); gap = sum of e^(z - top)·(z - top), or 0."""
    WIDTH: tl.constexpr = 128 // row.dtype.element_ty.primitive_bitwidth
    LANES: tl.constexpr = BLOCK // WIDTH
    head, body = cut(row, V)
    whole = body // BLOCK * BLOCK
    column = tl.arange(0, BLOCK)
    top = tl.full((LANES,), NEG_INF, tl.float32)
    mass = tl.zeros((LANES,), tl.float32)
    gap = tl.zeros((LANES,), tl.float32)

    start = 0
    while start < whole:
        x = tl.load(tl.multiple_of(row + (head + start), 16) + column).to(tl.float32)
        counts = column != target - head - start
        z = tl.where(counts, seen(x, transform), NEG_INF)
        top, mass, gap = observe_vectors(top, mass, gap, tl.reshape(z, (LANES, WIDTH)), ENTROPY)
        start += BLOCK
    if whole < body:
        inside = column < body - whole
        x = tl.load(tl.multiple_of(row + (head + whole), 16) + column, mask=inside, other=0.0).to(tl.float32)
        counts = inside & (column != target - head - whole)
        # select after the transform, or the softcap would turn what lies outside into a logit of -softcap
        z = tl.where(counts, seen(x, transform), NEG_INF)
        top, mass, gap = observe_vectors(top, mass, gap, tl.reshape(z, (LANES, WIDTH)), ENTROPY)

    end, at_ends = ends(head, body, V, WIDTH)
    x_ends = tl.load(row + end, mask=at_ends, other=0.0).to(tl.float32)
    z_ends = tl.where(at_ends & (end != target), seen(x_ends, transform), NEG_INF)
    return join(top, mass, gap, z_ends, ENTROPY)


@triton.jit
def join(top, mass, gap, z_ends, ENTROPY: tl.constexpr):
    """F2 over LANES states and the few logits of a row's ends: the state of the row."""
    row_top = tl.maximum(tl.max(top, 0), tl.max(z_ends, 0))
    anchor = tl.where(row_top == NEG_INF, 0.0, row_top)
    _, moved = merge(top, mass, row_top, 0.0)
    _, moved_ends = merge(z_ends, 1.0, row_top, 0.0)
    row_gap = 0.0
    if ENTROPY:
        row_gap = tl.sum(raise_gap(gap, mass, top - anchor), 0) + tl.sum(raise_gap(0.0, 1.0, z_ends - anchor), 0)
    return row_top, tl.sum(moved, 0) + tl.sum(moved_ends, 0), row_gap


@triton.jit
def map_row(source, target, V, function: tl.constexpr, known, BLOCK: tl.constexpr):
    """target[v] = function(source[v], v, known), in float32, rounded once; source and target may start at one place.

    Elements of one size are walked backwards, because a second walk that starts where the first one ended finds the end
    of the row still in cache.
    """
    if target.dtype.element_ty.primitive_bitwidth < source.dtype.element_ty.primitive_bitwidth:
        head, _ = cut(source, V)
        if misalignment(target + head) == 0:
            map_narrowing(source, target, V, function, known, BLOCK, True)
        else:
            map_narrowing(source, target, V, function, known, BLOCK, False)
    elif misalignment(source) == misalignment(target):
        map_span(source, target, V, function, known, BLOCK, True)
    else:  # rows of odd length with different strides: vectors in, single elements out
        map_span(source, target, V, function, known, BLOCK, False)


@triton.jit
def map_span(source, target, V, function: tl.constexpr, known, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    WIDTH: tl.constexpr = 128 // source.dtype.element_ty.primitive_bitwidth
    head, body = cut(source, V)
    whole = body // BLOCK * BLOCK
    column = tl.arange(0, BLOCK)
    kind = target.dtype.element_ty

    end, at_ends = ends(head, body, V, WIDTH)
    x_ends = tl.load(source + end, mask=at_ends, other=0.0).to(tl.float32)
    tl.store(target + end, function(x_ends, end, known).to(kind), mask=at_ends)
    if whole < body:
        first = head + whole
        inside = column < body - whole
        x = tl.load(tl.multiple_of(source + first, 16) + column, mask=inside, other=0.0).to(tl.float32)
        into = tl.multiple_of(target + first, 16) if ALIGNED else target + first
        tl.store(into + column, function(x, first + column, known).to(kind), mask=inside)
    start = whole
    while start > 0:
        start -= BLOCK
        first = head + start
        x = tl.load(tl.multiple_of(source + first, 16) + column).to(tl.float32)
        into = tl.multiple_of(target + first, 16) if ALIGNED else target + first
        tl.store(into + column, function(x, first + column, known).to(kind))


@triton.jit
def map_narrowing(source, target, V, function: tl.constexpr, known, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """To a target of half the size, which may lie over the first part of its own source, its tile b over tile b / 2.

    So it is walked forwards, and no warp stores a tile before all have loaded it: what is overwritten has been read.
    In one text with `map_span` it cost that one registers.
    """
    WIDTH: tl.constexpr = 128 // source.dtype.element_ty.primitive_bitwidth
    head, body = cut(source, V)
    whole = body // BLOCK * BLOCK
    column = tl.arange(0, BLOCK)
    kind = target.dtype.element_ty

    end, at_ends = ends(head, body, V, WIDTH)
    x_ends = tl.load(source + end, mask=at_ends, other=0.0).to(tl.float32)
    start = 0
    while start < whole:
        first = head + start
        x = tl.load(tl.multiple_of(source + first, 16) + column).to(tl.float32)
        tl.debug_barrier()
        into = tl.multiple_of(target + first, 16) if ALIGNED else target + first
        tl.store(into + column, function(x, first + column, known).to(kind))
        start += BLOCK
    if whole < body:
        first, inside = head + whole, column < body - whole
        x = tl.load(tl.multiple_of(source + first, 16) + column, mask=inside, other=0.0).to(tl.float32)
        tl.debug_barrier()
        into = tl.multiple_of(target + first, 16) if ALIGNED else target + first
        tl.store(into + column, function(x, first + column, known).to(kind), mask=inside)
    tl.debug_barrier()
    tl.store(target + end, function(x_ends, end, known).to(kind), mask=at_ends)


@triton.jit
def clear_row(target, V, BLOCK: tl.constexpr):
    """target[v] = 0, without reading anything."""
    WIDTH: tl.constexpr = 128 // target.dtype.element_ty.primitive_bitwidth
    head, body = cut(target, V)
    whole = body // BLOCK * BLOCK
    column = tl.arange(0, BLOCK)
    end, at_ends = ends(head, body, V, WIDTH)
    tl.store(target + end, 0.0, mask=at_ends)
    if whole < body:
        tl.store(tl.multiple_of(target + (head + whole), 16) + column, 0.0, mask=column < body - whole)
    start = 0
    while start < whole:
        tl.store(tl.multiple_of(target + (head + start), 16) + column, 0.0)
        start += BLOCK
