"""The two backward products over the columns that matter, and a thin product for all others.

Nearly all of a logits' gradient G lies in few columns. A tile of its rows is multiplied as

    G  ~  G in the kept columns, exactly  +  share · tail in all others,

`tail` with one row for a block of rows, `share` with what each row has of it. Every row of the error sums to zero, as
G's do, and no other tail of those shares would leave less. The columns kept are the fewest for which what lies outside
them is at most filter_eps of G: in the mean square over rows, each measured by its own norm (so that a loud row hides
no quiet one, for dX), and of the whole tile (for dW). docs/linear.md derives what that bounds. Where nearly all columns
matter the tile is multiplied whole.

Sizes: C rows of a chunk, N tiles of it of T rows; B blocks of a tile; V vocabulary (of this rank), K columns kept,
D hidden size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gft_kernels.linear.products import Head, multiply

TILE = 512  # rows that keep the same columns: fewer rows keep fewer, in thinner products
BLOCK = 64  # rows that share a tail: two products of 1/64 the size
DENSE = 0.5  # share of the columns kept beyond which gathering them saves little
SAMPLED = 8  # one row in so many tells whether a chunk is flat
NOTHING = 1e-12  # missing of a row, in units of its largest entry: far below what float32 can tell from 0
HUGE = 1e37  # where a float32 is still far from infinite
TINY = torch.finfo(torch.float32).tiny


class Sizes(NamedTuple):
    """What a look at some rows finds, each row in units of its largest entry, so that no square underflows."""

    unit_T: Tensor  # 1 / largest |entry|; 0 for a row of zeros
    sum_T: Tensor  # of the row, in that unit
    weight_T: Tensor  # of its squared error, in that unit squared


class Tile(NamedTuple):
    """Rows of a chunk and the columns they are multiplied in; None: all."""

    rows: slice
    kept_K: Tensor | None
    sizes: Sizes | None


def tiles_of(dlogits_CV: Tensor, filter_eps: float, measures: Any) -> list[Tile]:
    """Cut a chunk into tiles and choose their columns; dense neighbours are one. A GPU is waited for twice."""
    rows = len(dlogits_CV)
    size = -(-rows // -(-rows // TILE))
    # more rows keep more columns: where a few of each tile need too many, nobody looks at the others
    if size > SAMPLED and _are_flat(_measure(dlogits_CV[::SAMPLED], -(-size // SAMPLED), measures)[1], filter_eps):
        return [Tile(slice(0, rows), None, None)]
    sizes, energy_NV = _measure(dlogits_CV, size, measures)
    tiles: list[Tile] = []
    for number, kept_K in enumerate(_columns(energy_NV, filter_eps)):
        part = slice(number * size, min((number + 1) * size, rows))
        if kept_K is not None:
            tiles.append(Tile(part, kept_K, Sizes(*(x[part] for x in sizes))))
        elif tiles and tiles[-1].kept_K is None:
            tiles[-1] = Tile(slice(tiles[-1].rows.start, part.stop), None, None)
        else:
            tiles.append(Tile(part, None, None))
    return tiles


def _least(energy_NV: Tensor) -> int:
    """How many columns have to be left out for the others to be gathered."""
    return energy_NV.shape[1] - int(DENSE * energy_NV.shape[1])


def _are_flat(energy_NV: Tensor, filter_eps: float) -> bool:
    """Whether `_columns` would find too many in every tile: what it asks at one column, which takes no sorting."""
    least = _least(energy_NV)
    if least == 0:
        return False
    last_N1 = energy_NV.kthvalue(least, 1, keepdim=True).values
    before_NV = energy_NV < last_N1
    sum_N = torch.where(before_NV, energy_NV, 0.0).sum(1, dtype=torch.float64)
    sum_N = sum_N + last_N1[:, 0] * (least - before_NV.sum(1))
    return bool((sum_N > filter_eps**2).all())


def _columns(energy_NV: Tensor, filter_eps: float) -> list[Tensor | None]:
    """Of each tile the fewest columns beside which at most filter_eps² of the energy lies, in order; None: too many."""
    energy_NV, order_NV = energy_NV.sort(1)  # NaN comes last: beside it everything is kept
    dropped_N = (energy_NV.cumsum(1, dtype=torch.float64) <= filter_eps**2).sum(1).tolist()
    return [
        order_V[dropped:].sort().values if dropped >= _least(energy_NV) else None
        for order_V, dropped in zip(order_NV, dropped_N, strict=True)
    ]


def _measure(dlogits_CV: Tensor, size: int, measures: Any) -> tuple[Sizes, Tensor]:
    """Sizes of all rows, and of each `size` rows the energy of every column, (N, V): 2 over all columns."""
    top_C, sum_C, square_C = measures.row_sizes(dlogits_CV)
    unit_C = torch.where(top_C > 0.0, 1.0 / top_C, 0.0)
    weight_C = _weights(top_C, square_C, size)
    return Sizes(unit_C, sum_C, weight_C), measures.group_sums(dlogits_CV, size, unit_C * weight_C.sqrt(), squared=True)


def _weights(top_C: Tensor, square_C: Tensor, size: int) -> Tensor:
    """A row's own part of what its tile may leave out, as one of `size` rows, and its part by how loud it is there."""
    rows, spare = len(top_C), -len(top_C) % size
    top_NT, square_NT, one_NT = (F.pad(x, (0, spare)).view(-1, size) for x in (top_C, square_C, torch.ones_like(top_C)))
    loud_NT = (top_NT / top_NT.amax(1, keepdim=True).clamp_min(TINY)).square()
    whole_N1 = (loud_NT * square_NT).sum(1, keepdim=True).clamp_min(TINY)
    equal_NT = 1.0 / (one_NT.sum(1, keepdim=True) * square_NT.clamp_min(1.0))
    return (equal_NT + loud_NT / whole_N1).flatten()[:rows]


def add_products(
    head: Head,
    tiles: list[Tile],
    dlogits_CV: Tensor,
    hidden_CD: Tensor,
    out_CD: Tensor | None,
    out_VD: Tensor | None,
    add: bool,
    measures: Any,
) -> None:
    """out_CD = G · weight and out_VD (+)= Gᵀ · hidden for the rows of tiles with columns kept; None: not wanted.

    The thin products read head and dW once for all tiles. What was kept of a tile waits for them in the place of G.
    """
    operand, shares, tails = head.precision.operand, [], []
    kept: list[tuple[slice, Tensor, Tensor]] = []
    for rows, kept_K, sizes in tiles:
        assert kept_K is not None and sizes is not None
        kept_TK = dlogits_CV[rows].index_select(1, kept_K)
        share_TB, tail_BV = _tail(dlogits_CV[rows], kept_TK, kept_K, sizes, measures)
        shares.append(share_TB)
        tails.append(tail_BV.to(operand))
        kept.append((rows, kept_K, dlogits_CV[rows, : len(kept_K)].copy_(kept_TK)))
    tail_BV, blocks = torch.cat(tails), [len(tail) for tail in tails]
    if out_CD is not None:
        mean_BD = out_CD.new_empty(len(tail_BV), out_CD.shape[1])
        head.hidden_gradient(tail_BV, mean_BD)
        for (rows, kept_K, kept_TK), share_TB, mean in zip(kept, shares, mean_BD.split(blocks), strict=True):
            multiply(kept_TK, head.columns(kept_K), out_CD[rows])
            out_CD[rows].addmm_(share_TB, mean)
    if out_VD is not None:
        states = [share.t() @ hidden_CD[tile.rows].float() for tile, share in zip(tiles, shares, strict=True)]
        multiply(tail_BV.t(), torch.cat(states).to(operand), out_VD, add=add)
        for rows, kept_K, kept_TK in kept:
            kept_KD = out_VD.new_empty(len(kept_K), out_VD.shape[1], dtype=torch.float32)
            multiply(kept_TK.t(), hidden_CD[rows], kept_KD)
            out_VD.index_add_(0, kept_K, kept_KD.to(out_VD.dtype))


def _tail(dlogits_TV: Tensor, kept_TK: Tensor, kept_K: Tensor, sizes: Sizes, measures: Any) -> tuple[Tensor, Tensor]:
    """share (T, B) and tail (B, V), 0 in the kept columns: within a block the least-squares fit to what is left out
    whose share is known, the sum of what the row leaves out.

    A tail is as large as the shares of its rows, which sum to 1 in size: float16 holds it wherever it holds G.
    """
    missing_T = sizes.sum_T - kept_TK.sum(1, dtype=torch.float32) * sizes.unit_T
    missing_T = torch.where(missing_T.abs() > NOTHING, missing_T, 0.0)
    pull_T = sizes.weight_T * missing_T
    size_T = torch.where(sizes.unit_T > 0.0, missing_T.abs() / sizes.unit_T, 0.0)
    block_T = torch.arange(len(kept_TK), device=kept_K.device) // BLOCK
    zeros_B = missing_T.new_zeros(-(-len(kept_TK) // BLOCK))
    fit_B = zeros_B.index_add(0, block_T, pull_T * missing_T).clamp_min(TINY)
    size_B = zeros_B.index_add(0, block_T, size_T).clamp_min(TINY)
    factor_T = pull_T * (size_B / fit_B)[block_T]
    factor_T = (factor_T * sizes.unit_T).clamp(-HUGE, HUGE)  # a row so much quieter than its block is denormal
    tail_BV = measures.group_sums(dlogits_TV, BLOCK, factor_T).index_fill_(1, kept_K, 0.0)
    share_TB = missing_T.new_zeros(len(kept_TK), len(zeros_B))
    share_TB[torch.arange(len(kept_TK), device=kept_K.device), block_T] = missing_T.sign() * size_T / size_B[block_T]
    return share_TB, tail_BV
