"""What is interpreted of a test's parametrisation: each value of each parameter once.

The other backends take every combination, and so does Triton on a GPU. The tests beside this file are Triton's alone.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def covering(items: list[pytest.Item]) -> list[pytest.Item]:
    """Cases of each test in which no value is missing, each chosen for having most of those that still are."""
    tests, kept = defaultdict(list), set()
    for item in items:
        tests[item.nodeid.partition("[")[0]].append(item)
    for cases in tests.values():
        missing = set().union(*map(values, cases))
        while missing:
            best = max(cases, key=lambda case: len(missing & values(case)))
            missing -= values(best)
            kept.add(best)
    return [item for item in items if item in kept or not values(item)]


def values(item: pytest.Item) -> set[tuple[str, str]]:
    """Its parameters, each with its value as text."""
    if item.path.parent == HERE or not hasattr(item, "callspec"):
        return set()
    return {(name, repr(value)) for name, value in item.callspec.params.items()}
