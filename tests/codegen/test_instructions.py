"""The guard on instruction counts: it names a pass that has become dearer, and knows every pass."""

from __future__ import annotations

import shutil
from itertools import product

import pytest

from tests.codegen import instructions

EVERY = [
    " ".join(parts)
    for parts in product(instructions.SETS + instructions.ARM_SETS, instructions.DTYPES, instructions.PASSES)
]


@pytest.mark.parametrize("name", EVERY)
def test_a_pass_beyond_its_limit_is_named(name):
    limit = instructions.limit_of(name)
    assert instructions.broken_by({name: limit}) == []
    (sentence,) = instructions.broken_by({**dict.fromkeys(EVERY, 0.1), name: limit * 1.01})
    assert sentence.startswith(f"{name}: instructions an element must be at most {limit:g}, got")


def test_vectors_are_cheaper_than_elements():
    for name, dtype, walk in product(("avx2", "neon", "neonbf16"), instructions.DTYPES, instructions.PASSES):
        vectors, elements = (instructions.limit_of(f"{one} {dtype} {walk}") for one in (name, "portable"))
        assert vectors < elements, name


def test_without_its_tools_it_says_so_and_passes(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda tool, **_kwargs: None if "a" in tool else tool)
    assert instructions.check()
    assert capsys.readouterr().out == (
        "instruction counts of portable, avx2 skipped: valgrind is not on the PATH\n"
        "instruction counts of neon, neonbf16 skipped: aarch64-linux-gnu-g++ is not on the PATH\n"
    )
