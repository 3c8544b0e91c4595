"""The traffic model: how many bytes and operations a path cannot do without.

A pass is all N·V logits once, N·V·b bytes. Reads and writes are counted apart, because a write-allocate cache and a
streaming store differ by a read. Linear paths are counted in floating-point operations: 2·N·D·V for each product.
"""

from __future__ import annotations

from dataclasses import dataclass

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Passes:
    """Reads and writes of logits-sized arrays."""

    reads: float
    writes: float
    path: str

    def bytes_moved(self, rows: int, vocab: int, dtype: str) -> float:
        return (self.reads + self.writes) * logits_bytes(rows, vocab, dtype)


FLOOR = Passes(1, 1, "the gradient is written where the logits were, and a row stays on chip in between")
TWO_PASS = Passes(2, 1, "statistics first, gradient from a second read")
PAPER = Passes(8, 6, "clone, divide, cross-entropy, softmax, gather, autograd")

MODEL = (
    "pass = rows·vocab·itemsize bytes; floor: 1 read + 1 write; statistics then gradient: 2 reads + 1 write; "
    "the paper's own formulation: about 8 reads + 6 writes; linear: 6·rows·hidden·vocab FLOP (three products)"
)


def logits_bytes(rows: int, vocab: int, dtype: str) -> int:
    return rows * vocab * ITEM_BYTES[dtype]


def linear_flop(rows: int, hidden: int, vocab: int, products: int = 3) -> int:
    """Operations of the linear path: logits = X·Wᵀ, dX = G·W and dW = Gᵀ·X need three products of 2·N·D·V each.

    Four are paid by whoever computes the logits again in the backward pass.
    """
    return 2 * products * rows * hidden * vocab


ROW_FLOP = 22
"""Operations a logit: two exponentials (degree 5: a reduction, five multiply-adds, a scaling are about 9), two sums."""


def row_flop(rows: int, vocab: int) -> int:
    """Useful operations of loss and gradient over logits, however a contender gets there."""
    return ROW_FLOP * rows * vocab


def linear_bytes(rows: int, hidden: int, vocab: int, dtype: str) -> int:
    """What a loss over hidden states and head cannot do without: both read, both gradients written, no logits."""
    return 2 * (rows + vocab) * hidden * ITEM_BYTES[dtype]
