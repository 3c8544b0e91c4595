"""The longest sequence whose step stays within a memory budget, by measured peaks.

Peak memory is nearly a straight line in the number of tokens, so a line through two measured peaks says where the
budget ends; that length is measured in its turn, and the line drawn again, until a length that fits and one that does
not lie close together. Every peak is the kernel's own figure of a process of its own (memory.py): no limit is imposed
on anyone, so what is found does not depend on how a library behaves when memory runs out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

GRAIN = 4  # tokens
CLOSE = 0.05  # a length that fits is good enough if one that is larger by this share does not
PROBES = 8


@dataclass(frozen=True)
class Found:
    """tokens: the longest length that was measured to fit, 0 for none. peaks: (tokens, bytes) as they were measured."""

    tokens: int
    peaks: list[tuple[int, int]]


def longest(peak: Callable[[int], int], budget_bytes: int, start: int = 8 * GRAIN) -> Found:
    """peak: bytes at a number of tokens. Lengths are multiples of GRAIN."""
    measured: dict[int, int] = {}
    tokens = start
    for _ in range(PROBES):
        measured[tokens] = peak(tokens)
        fits = max((t for t, b in measured.items() if b <= budget_bytes), default=0)
        fails = min((t for t, b in measured.items() if b > budget_bytes), default=None)
        if fails is not None and fails - fits <= max(GRAIN, CLOSE * fits):
            break
        tokens = _next(measured, budget_bytes, fits, fails)
    return Found(fits, sorted(measured.items()))


def _next(measured: dict[int, int], budget_bytes: int, fits: int, fails: int | None) -> int:
    """Where the line through the two peaks nearest to the budget meets it, between what fits and what fails."""
    if len(measured) == 1:
        return 2 * fits if fits else GRAIN
    (a, peak_a), (b, peak_b) = sorted(measured.items(), key=lambda entry: abs(entry[1] - budget_bytes))[:2]
    slope = (peak_b - peak_a) / (b - a)
    guess = 2 * max(measured) if slope <= 0 else int(a + (budget_bytes - peak_a) / slope)
    guess = guess // GRAIN * GRAIN
    if fails is None:
        # past the guess by a little, so that one side of it is known to fail
        return max(fits + GRAIN, min(guess, 64 * fits)) if guess > fits * (1 + CLOSE) else fits + _grains(CLOSE * fits)
    return min(max(guess, fits + GRAIN), fails - GRAIN)


def _grains(tokens: float) -> int:
    return max(GRAIN, int(tokens) // GRAIN * GRAIN)
