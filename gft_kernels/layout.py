"""Whether two elements of a strided tensor share an address: in place both would be written."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def shares_memory(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether two elements of a layout of up to three dimensions have one address; exact, but for a traced one."""
    if any(size == 0 for size in shape):
        return False
    dims = [(stride, size) for stride, size in zip(strides, shape, strict=True) if size > 1]
    nested = True
    for i, (stride, _) in enumerate(dims):  # each step leaves behind all that steps as long or shorter reach
        reach = sum(s * (n - 1) for j, (s, n) in enumerate(dims) if j != i and s <= stride)
        nested = nested and stride > reach
    if nested or torch.compiler.is_compiling():
        return not nested
    if any(stride == 0 for stride, _ in dims):
        return True
    dims.sort(key=lambda dim: dim[1])
    first, (a, m), (b, n) = dims[0] if len(dims) == 3 else (0, 1), *dims[-2:]
    return any(_meet(a, m, b, n, first[0] * steps, steps == 0) for steps in range(first[1]))


def _meet(a: int, m: int, b: int, n: int, distance: int, other: bool) -> bool:
    """Whether i·a + j·b = -distance for some |i| < m, |j| < n; `other` than i = j = 0."""
    common = math.gcd(a, b)
    if distance % common:
        return False
    a, b, distance = a // common, b // common, distance // common
    known = -distance * pow(a, -1, b) % b if b > 1 else 0  # i, up to multiples of b
    for i in range(known - (known + m - 1) // b * b, m, b):
        j = (-distance - i * a) // b
        if abs(j) < n and not (other and i == 0 and j == 0):
            return True
    return False
