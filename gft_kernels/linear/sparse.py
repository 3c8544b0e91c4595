"""The two backward products over the columns that matter, and a thin product for all others.

Nearly all of a logits' gradient G lies in few columns. A tile of its rows is multiplied as

    G  ~  G in the kept columns, exactly  +  share · tail in all others,

`tail` with one row for a block of rows, `share` with what each row has of it. Every row of the error sums to zero, as
G's do, and no other tail of those shares would leave less. The columns kept are the fewest for which what lies outside
them is at most filter_eps of G: in the mean square over rows, each measured by its own norm (so that a loud row hides
no quiet one, for dX), and of the whole tile (for dW). docs/linear.md derives what that bounds. Where nearly all columns
matter the tile is multiplied whole.

Sizes: C rows of a chunk, T of a tile, P of a panel; B blocks of a tile; V vocabulary (of this rank), K columns kept,
D hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gft_kernels.linear.products import Head, multiply

TILE = 512  # rows that keep the same columns: fewer rows keep fewer, in thinner products
BLOCK = 64  # rows that share a tail: two products of 1/64 the size
DENSE = 0.5  # share of the columns kept beyond which gathering them saves little
SAMPLED = 8  # one row in so many tells whether a tile is flat
PANEL = 8  # rows that a CPU looks at at a time, which its cache still holds; to a GPU each look is a dozen launches
NOTHING = 1e-12  # missing of a row, in units of its largest entry: far below what float32 can tell from 0
HUGE = 1e37  # where a float32 is still far from infinite
TINY = torch.finfo(torch.float32).tiny


class Sizes(NamedTuple):
    """What one pass over a tile finds, each row in units of its largest entry, so that no square underflows."""

    unit_T: Tensor  # 1 / largest |entry|; 0 for a row of zeros
    sum_T: Tensor  # of the row, in that unit
    weight_T: Tensor  # of its squared error, in that unit squared
    energy_V: Tensor  # sum of weight · entry² over the rows: 2 over all columns


class Tile(NamedTuple):
    """Rows of a chunk and the columns they are multiplied in; None: all."""

    rows: slice
    kept_K: Tensor | None
    sizes: Sizes | None


def tiles_of(dlogits_CV: Tensor, filter_eps: float) -> list[Tile]:
    """Cut a chunk into tiles and choose their columns; dense neighbours are one. A GPU is waited for in each tile."""
    size = -(-len(dlogits_CV) // -(-len(dlogits_CV) // TILE))
    tiles: list[Tile] = []
    for start in range(0, len(dlogits_CV), size):
        dlogits_TV, sizes, kept_K = dlogits_CV[start : start + size], None, None
        rows = slice(start, start + len(dlogits_TV))
        # more rows keep more columns: behind a flat tile a few rows that need too many spare a look at the others
        flat = not tiles or tiles[-1].kept_K is None
        if not flat or _columns(measure(dlogits_TV[::SAMPLED]), filter_eps) is not None:
            sizes = measure(dlogits_TV)
            kept_K = _columns(sizes, filter_eps)
        if kept_K is None and tiles and tiles[-1].kept_K is None:
            tiles[-1] = Tile(slice(tiles[-1].rows.start, rows.stop), None, None)
        else:
            tiles.append(Tile(rows, kept_K, sizes))
    return tiles


def _columns(sizes: Sizes, filter_eps: float) -> Tensor | None:
    """The fewest columns beside which at most filter_eps² of the energy lies, in order; None: too many to gather."""
    energy_V, order_V = sizes.energy_V.sort()  # NaN comes last: beside it everything is kept
    dropped = int((energy_V.cumsum(0, dtype=torch.float64) <= filter_eps**2).sum())
    return order_V[dropped:].sort().values if len(order_V) - dropped <= DENSE * len(order_V) else None


def measure(dlogits_TV: Tensor) -> Sizes:
    """Norms and sums of a tile's rows, and the energy of its columns, in one pass."""
    rows = len(dlogits_TV)
    unit_T, sum_T, equal_T, loud_T = dlogits_TV.new_empty(4, rows, dtype=torch.float32)
    energy_2V = dlogits_TV.new_zeros(2, dlogits_TV.shape[1], dtype=torch.float32)
    whole, base = unit_T.new_zeros(()), None
    size = PANEL if dlogits_TV.device.type == "cpu" else rows
    scaled_PV = torch.empty_like(dlogits_TV[:size], dtype=torch.float32)
    for start in range(0, rows, size):
        panel, at = dlogits_TV[start : start + size], slice(start, start + size)
        top_P = torch.maximum(panel.amax(1), -panel.amin(1)).float()
        if base is None:  # loudness is relative; beyond 1e19 of the first rows' it is infinite, and the tile dense
            base = top_P.amax().clamp_min(TINY)
        unit_T[at] = torch.where(top_P > 0.0, 1.0 / top_P, 0.0)
        panel = torch.mul(panel, unit_T[at, None], out=scaled_PV[: len(panel)])
        torch.sum(panel, 1, out=sum_T[at])
        square_P = panel.square_().sum(1)
        equal_T[at] = 1.0 / (rows * square_P.clamp_min(1.0))
        loud_T[at] = (top_P / base).square()
        whole += (loud_T[at] * square_P).sum()
        energy_2V.addmm_(torch.stack([equal_T[at], loud_T[at]]), panel)
    whole.clamp_min_(TINY)
    return Sizes(unit_T, sum_T, equal_T + loud_T / whole, energy_2V[0] + energy_2V[1] / whole)


def add_products(
    head: Head,
    tiles: list[Tile],
    dlogits_CV: Tensor,
    hidden_CD: Tensor,
    out_CD: Tensor | None,
    out_VD: Tensor | None,
    add: bool,
) -> None:
    """out_CD = G · weight and out_VD (+)= Gᵀ · hidden for the rows of tiles with columns kept; None: not wanted.

    The thin products read head and dW once for all tiles.
    """
    operand, shares, tails = head.precision.operand, [], []
    if out_VD is not None and not add:
        out_VD.zero_()
    for rows, kept_K, sizes in tiles:
        assert kept_K is not None and sizes is not None
        dlogits_TV = dlogits_CV[rows]
        kept_TK = dlogits_TV.index_select(1, kept_K).float()
        share_TB, tail_BV = _tail(dlogits_TV, kept_TK, kept_K, sizes)
        shares.append(share_TB)
        tails.append(tail_BV.to(operand))
        kept_TK = kept_TK.to(operand)
        if out_CD is not None:
            multiply(kept_TK, head.columns(kept_K), out_CD[rows])
        if out_VD is not None:
            kept_KD = torch.empty(len(kept_K), out_VD.shape[1], device=out_VD.device)
            multiply(kept_TK.t(), hidden_CD[rows], kept_KD)
            out_VD.index_add_(0, kept_K, kept_KD.to(out_VD.dtype))
    tail_BV, blocks = torch.cat(tails), [len(tail) for tail in tails]
    if out_CD is not None:
        mean_BD = out_CD.new_empty(len(tail_BV), out_CD.shape[1])
        head.hidden_gradient(tail_BV, mean_BD)
        for tile, share_TB, mean in zip(tiles, shares, mean_BD.split(blocks), strict=True):
            out_CD[tile.rows].addmm_(share_TB, mean)
    if out_VD is not None:
        states = [share.t() @ hidden_CD[tile.rows].float() for tile, share in zip(tiles, shares, strict=True)]
        multiply(tail_BV.t(), torch.cat(states).to(operand), out_VD, add=True)


def _tail(dlogits_TV: Tensor, kept_TK: Tensor, kept_K: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """share (T, B) and tail (B, V), 0 in the kept columns: within a block the least-squares fit to what is left out
    whose share is known, the sum of what the row leaves out.

    A tail is as large as the shares of its rows, which sum to 1 in size: float16 holds it wherever it holds G.
    """
    missing_T = sizes.sum_T - kept_TK.sum(1) * sizes.unit_T
    missing_T = torch.where(missing_T.abs() > NOTHING, missing_T, 0.0)
    pull_T = sizes.weight_T * missing_T
    size_T = torch.where(sizes.unit_T > 0.0, missing_T.abs() / sizes.unit_T, 0.0)
    block_T = torch.arange(len(kept_TK), device=kept_K.device) // BLOCK
    zeros_B = kept_TK.new_zeros(-(-len(kept_TK) // BLOCK))
    fit_B = zeros_B.index_add(0, block_T, pull_T * missing_T).clamp_min(TINY)
    size_B = zeros_B.index_add(0, block_T, size_T).clamp_min(TINY)
    factor_T = pull_T * (size_B / fit_B)[block_T]
    tail_BV = kept_TK.new_empty(len(zeros_B), dlogits_TV.shape[1])
    factor_T = (factor_T * sizes.unit_T).clamp(-HUGE, HUGE)  # a row so much quieter than its block is denormal
    blocks = zip(tail_BV, dlogits_TV.split(BLOCK), factor_T.split(BLOCK), strict=True)
    for tail_V, rows_V, factor in blocks:
        torch.mv(rows_V.float().t(), factor, out=tail_V)
    tail_BV.index_fill_(1, kept_K, 0.0)
    share_TB = kept_TK.new_zeros(len(kept_TK), len(zeros_B))
    share_TB[torch.arange(len(kept_TK), device=kept_K.device), block_T] = missing_T.sign() * size_T / size_B[block_T]
    return share_TB, tail_BV
