"""What follows from a caller's numbers and words alone, found once for each choice of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TypeVar

import torch

F = TypeVar("F", bound=Callable)
PLAIN = frozenset((float, int, bool, str, type(None)))


def by_value(function: F) -> F:
    """The same function of positional arguments, which answers from memory what it was asked before.

    True, 1 and 1.0 are three questions. What is raised is not kept, nor is anything of a value that could change or
    hold a tensor: an argument of another type has the function run, as a trace by torch.compile has.
    """
    kept = lru_cache(maxsize=256, typed=True)(function)

    @wraps(function)
    def answer(*values):
        if torch.compiler.is_compiling() or not PLAIN.issuperset(map(type, values)):
            return function(*values)
        return kept(*values)

    return answer  # type: ignore[return-value]
