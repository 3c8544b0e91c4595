"""The record of what compilers made of the kernels: a change is a readable diff, and accepted in one command."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from benchmarks.gates import __main__ as gates
from benchmarks.gates import cuda_gate, record, triton_gate
from benchmarks.gates.measures import Measures, Verdict

FIGURES = Measures(64, 0, 0, 6, 4, 3, 9, 0)
BUILD = [Verdict("sm_80 row_loss", FIGURES, []), Verdict("sm_90 row_loss", FIGURES, [])]


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "compiled.txt"
    record.accept("Triton", "Triton 3.7", BUILD, file)
    record.accept("CUDA", "nvcc 13", BUILD[:1], file)
    return file


def test_an_unchanged_build_agrees(path):
    assert record.differences("Triton", "Triton 3.7", BUILD, path) == ("", True)
    assert record.differences("Triton", "Triton 3.7", BUILD[1:], path) == ("", True), "one target alone"


def test_a_change_is_one_line_out_and_one_line_in(path):
    changed = [BUILD[0], replace(BUILD[1], measures=replace(FIGURES, wide_loads=5))]
    diff, counts = record.differences("Triton", "Triton 3.7", changed, path)
    out, into = (text for text in diff.splitlines() if text[1:].startswith("sm_"))
    assert out == "-" + record.line(BUILD[1]) and into == "+" + record.line(changed[1]) and counts
    assert "wide loads 5" in into
    record.accept("Triton", "Triton 3.7", changed, path)
    assert record.differences("Triton", "Triton 3.7", changed, path) == ("", True)
    assert record.differences("CUDA", "nvcc 13", BUILD[:1], path) == ("", True), "the other section stays"


def test_a_variant_that_comes_or_goes_is_a_difference(path):
    new = Verdict("sm_90 other", FIGURES, [])
    assert "+sm_90 other" in record.differences("Triton", "Triton 3.7", [*BUILD, new], path)[0]
    assert "-sm_90 row_loss" in record.differences("Triton", "Triton 3.7", [*BUILD[:1], replace(new)], path)[0]


@pytest.mark.parametrize(("compiler", "passed", "said"), [
    ("nvcc 13", False, "--accept, and commit"),
    ("nvcc 14", True, "so differences do not count"),
])  # fmt: skip
def test_only_the_records_own_compiler_fails(path, monkeypatch, capsys, compiler, passed, said):
    changed = [replace(BUILD[0], measures=replace(FIGURES, registers=65))]
    gate = SimpleNamespace(compiler=lambda: compiler)
    monkeypatch.setattr(record.differences, "__defaults__", (path,))
    assert gates.as_recorded("CUDA", gate, changed) is passed
    assert said in capsys.readouterr().out


def test_the_committed_record_has_every_variant():
    sections = record.read()
    triton = {text.split(":")[0] for text in sections["Triton"][1:]}
    assert triton == {variant.name for variant in triton_gate.variants()}, "python -m benchmarks.gates --accept"
    assert {text.split()[0] for text in sections["CUDA"][1:]} == set(cuda_gate.TARGETS)
