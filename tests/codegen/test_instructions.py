"""The guard on instruction counts: it names a pass that has become dearer, and knows every pass."""

from __future__ import annotations

from itertools import product

import pytest

from tests.codegen import instructions

EVERY = [" ".join(parts) for parts in product(instructions.SETS, instructions.DTYPES, instructions.PASSES)]


@pytest.mark.parametrize("name", EVERY)
def test_a_pass_beyond_its_limit_is_named(name):
    limit = instructions.limit_of(name)
    assert instructions.broken_by({name: limit}) == []
    (sentence,) = instructions.broken_by({**dict.fromkeys(EVERY, 0.1), name: limit * 1.01})
    assert sentence.startswith(f"{name}: instructions an element must be at most {limit:g}, got")


def test_vectors_are_cheaper_than_elements():
    for dtype, walk in product(instructions.DTYPES, instructions.PASSES):
        assert instructions.limit_of(f"avx2 {dtype} {walk}") < instructions.limit_of(f"portable {dtype} {walk}")


def test_without_valgrind_it_says_so_and_passes(monkeypatch, capsys):
    monkeypatch.setattr(instructions.shutil, "which", lambda *_args, **_kwargs: None)
    assert instructions.check()
    assert capsys.readouterr().out == "instruction counts skipped: valgrind is not on the PATH\n"
