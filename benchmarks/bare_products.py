"""The floor of losses over hidden states: matrix products into memory that is there already, best orientation each."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[], object]


def bare_products_step(hidden_ND: Tensor, weight_VD: Tensor, products: int = 3) -> Callable[[], None]:
    """logits = X·Wᵀ, dX = G·W and dW = Gᵀ·X, with the logits themselves standing in for G; nothing is allocated.

    products: 1 leaves it at the logits.

    For each product both orientations are tried once, A·B into a matrix and Bᵀ·Aᵀ into its transpose, and the faster
    is kept: libraries differ in which layout of a skinny product they do well.
    """
    hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
    logits_NV = hidden_ND.new_empty(hidden_ND.shape[0], weight_VD.shape[0])
    dhidden_ND, dweight_VD = torch.empty_like(hidden_ND), torch.empty_like(weight_VD)
    chosen: list[Product] = []

    def choose() -> None:
        # in this order: the products that read the logits need them filled with numbers of their own size
        chosen.append(_faster(hidden_ND, weight_VD.t(), logits_NV))
        if products == 1:
            return
        chosen.append(_faster(logits_NV, weight_VD, dhidden_ND))
        chosen.append(_faster(logits_NV.t(), hidden_ND, dweight_VD))

    def step() -> None:
        with torch.no_grad():
            if not chosen:
                choose()
            for product in chosen:
                product()

    return step


def _faster(a: Tensor, b: Tensor, out: Tensor) -> Product:
    """The faster of out = a·b and outᵀ = bᵀ·aᵀ, by two tries each."""
    flipped = out.new_empty(out.shape[::-1])
    candidates = (lambda: torch.mm(a, b, out=out), lambda: torch.mm(b.t(), a.t(), out=flipped))
    best = min(range(2), key=lambda i: min(_seconds(candidates[i]) for _ in range(2)))
    if best == 0:
        return candidates[0]
    out.copy_(flipped.t())
    return candidates[1]


def _seconds(product: Product) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    product()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
