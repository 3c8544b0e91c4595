"""The three matrix products of the linear loss: logits, hidden gradient and head gradient, with float32 sums.

A half-precision product that rounds its result to half loses what the loss needs: logits of size 100 come out in steps
of 0.5 in bfloat16, and no later cast brings the digits back. So logits are float32 unless asked otherwise, in
one of two ways: where the platform multiplies halves into float32 (CUDA and ROCm, torch >= 2.8), it does; elsewhere (a
CPU) the operands are first rounded to the product dtype, then multiplied as float32, the head a block at a time.

Sizes: C rows of a chunk, D hidden size, V vocabulary, B columns of a block of the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from gft_kernels.options import LinearCall

BLOCK_BYTES = 8 << 20
"""Of the head converted to float32 at a time: large enough for a product's full speed, small enough for a cache."""


@cache
def multiplies_into_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this platform has the product half x half -> float32. Asked once, by trying it."""
    if device.type == "cpu":
        return False
    a, out = torch.ones(16, 16, dtype=dtype, device=device), torch.ones(16, 16, device=device)
    try:
        torch.mm(a, a, out_dtype=torch.float32, out=out)
        torch.addmm(out, a, a, out_dtype=torch.float32, out=out)
    except (TypeError, RuntimeError):  # an older torch knows no out_dtype; a device may not implement it
        return False
    return True


def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a @ b, or out += a @ b, summed in float32 and rounded to the dtype of `out` where that is narrower."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif out.dtype == torch.float32 and multiplies_into_float32(a.device, a.dtype):
        if add:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        product = torch.mm(a, b)
        out.add_(product) if add else out.copy_(product)


@dataclass(frozen=True)
class Precision:
    """The dtypes one call multiplies in on its device."""

    product: torch.dtype  # what hidden and weight are rounded to
    operand: torch.dtype  # what they are multiplied as, like the logits' gradient: float32 where halves sum in halves
    logits: torch.dtype


def precision_of(call: LinearCall) -> Precision:
    """How a call multiplies: see the module's text."""
    native = call.logits_dtype == call.product_dtype
    wide = native or multiplies_into_float32(call.hidden_STD.device, call.product_dtype)
    return Precision(call.product_dtype, call.product_dtype if wide else torch.float32, call.logits_dtype)


class Head:
    """The output head as the products want it: in the operands' dtype, whole or a block of columns at a time."""

    def __init__(self, weight_VD: Tensor, bias_V: Tensor | None, precision: Precision):
        self.precision = precision
        self.bias_V = None if bias_V is None else bias_V.detach().to(precision.logits)
        self.weight_VD = weight_VD.detach()
        self.rounded_BD = self.block_BD = None
        if precision.operand == precision.product:  # under autocast one converted copy, as torch's own autocast keeps
            self.weight_VD = self.weight_VD.to(precision.operand)
        else:  # one buffer for all blocks: the allocator would scatter a new one each time over the heap
            rows = min(weight_VD.shape[0], max(1, BLOCK_BYTES // (4 * max(weight_VD.shape[1], 1))))
            self.rounded_BD = self.weight_VD.new_empty(rows, weight_VD.shape[1], dtype=precision.product)
            self.block_BD = self.weight_VD.new_empty(rows, weight_VD.shape[1], dtype=precision.operand)

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        if self.rounded_BD is None or self.block_BD is None:
            yield slice(None), self.weight_VD
            return
        for start in range(0, len(self.weight_VD), max(len(self.block_BD), 1)):
            weight_BD = self.weight_VD[start : start + len(self.block_BD)]
            rounded_BD = self.rounded_BD[: len(weight_BD)].copy_(weight_BD)
            yield slice(start, start + len(weight_BD)), self.block_BD[: len(weight_BD)].copy_(rounded_BD)

    def rows(self, hidden_CD: Tensor) -> Tensor:
        """Hidden states as the products want them."""
        return hidden_CD.to(self.precision.product).to(self.precision.operand)

    def columns(self, chosen_K: Tensor) -> Tensor:
        """The weight of some columns of the logits, (K, D), as the products want it."""
        return self.rows(self.weight_VD.index_select(0, chosen_K))

    def logits(self, hidden_CD: Tensor, out_CV: Tensor) -> None:
        """First product: out = hidden @ weight^T + bias."""
        for block, weight_BD in self._blocks():
            multiply(hidden_CD, weight_BD.t(), out_CV[:, block])
        if self.bias_V is not None:
            out_CV.add_(self.bias_V)

    def hidden_gradient(self, dlogits_CV: Tensor, out_CD: Tensor) -> None:
        """Second product: out = dlogits @ weight."""
        if not len(self.weight_VD):  # an empty shard
            out_CD.zero_()
        for number, (block, weight_BD) in enumerate(self._blocks()):
            multiply(dlogits_CV[:, block], weight_BD, out_CD, add=number > 0)
