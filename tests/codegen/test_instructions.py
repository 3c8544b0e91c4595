"""The guard on instruction counts: it names a pass that has become dearer, and knows every pass."""

from __future__ import annotations

import shutil
import subprocess
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.codegen import instructions

EVERY = [
    " ".join(parts)
    for parts in product(instructions.SETS + instructions.ARM_SETS, instructions.DTYPES, instructions.PASSES)
] + [f"{kind} {walk}" for kind in instructions.LIMITS if "avx512" in kind for walk in instructions.LISTED_PASSES]


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


def test_loops_of_avx512_are_told_apart(monkeypatch):
    """By what their instructions are, in a listing as objdump prints it."""
    power = "vscalefps %zmm1,%zmm2,%zmm3"
    bodies = {
        "avx512 float32 statistics": ["prefetcht0 0x40(%rax)"] + 4 * [power],
        "avx512 bfloat16 gradient": ["vpslld $0x10,%zmm1,%zmm2"] + 4 * [power],
        "avx512 float16 gradient": ["vcvtph2ps (%rax),%zmm1"] + 4 * [power],
        "avx512bf16 bfloat16 gradient": ["vpslld $0x10,%zmm1,%zmm2", "vcvtne2ps2bf16 %zmm1,%zmm2,%zmm3"] + 4 * [power],
        "no vectors of four": 3 * [power],
    }
    lines, address = [], 0x100
    for body in bodies.values():
        texts = [*body, f"jne    {address:x} <gft>"]
        lines += [f"  {address + 4 * i:x}:\t{text}" for i, text in enumerate(texts)]
        address += 4 * len(texts)
    monkeypatch.setattr(subprocess, "run", lambda *_a, **_k: SimpleNamespace(stdout="\n".join(lines)))
    found = instructions.listed(Path("driver"))
    assert found == {name: (len(body) + 1) / 64 for name, body in bodies.items() if name in found} and len(found) == 4


def test_without_its_tools_it_says_so_and_passes(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda tool, **_kwargs: None if "a" in tool else tool)
    assert instructions.check()
    assert capsys.readouterr().out == (
        "instruction counts of portable, avx2 skipped: valgrind is not on the PATH\n"
        "instruction counts of neon, neonbf16 skipped: aarch64-linux-gnu-g++ is not on the PATH\n"
    )
