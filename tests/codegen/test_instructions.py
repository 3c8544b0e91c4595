"""The guard on instruction counts: it must see a change, in either direction, and only count its own compiler's."""

from __future__ import annotations

import pytest

from benchmarks.instructions import __main__ as guard

COUNTS = {"avx2 float32 statistics": 2.777, "avx2 float32 gradient": 2.519}


def test_the_record_is_read_as_it_was_written(tmp_path):
    guard.write(COUNTS, "g++ (Somebody 1.2: the third) 12", path := tmp_path / "counts.txt")
    assert guard.read(path) == ("g++ (Somebody 1.2: the third) 12", COUNTS)


@pytest.mark.parametrize("factor", [0.9, 1.03])
def test_a_change_is_a_readable_line(factor):
    now = COUNTS | {"avx2 float32 gradient": 2.519 * factor}
    (line,) = guard.changes(COUNTS, now)
    assert line.startswith(f"avx2 float32 gradient: 2.519 → {2.519 * factor:.3f} instructions an element (")
    assert guard.changes(COUNTS, COUNTS | {"avx2 float32 gradient": 2.519 * 1.01}) == []


def test_a_pass_that_comes_or_goes_is_a_change():
    assert len(guard.changes(COUNTS, {"new": 1.0})) == 3


@pytest.mark.parametrize(("lines", "own", "code", "said"), [
    ([], True, 0, "within 2% of the record"),
    (["x: 1 → 2"], True, 1, "--accept, and commit"),
    (["x: 1 → 2"], False, 0, "differences do not count"),
])  # fmt: skip
def test_only_the_records_own_compiler_fails(lines, own, code, said, capsys):
    assert guard.judge(lines, own, "g++ 12") == code
    assert said in capsys.readouterr().out


def test_without_valgrind_it_says_so_and_passes(monkeypatch, capsys):
    monkeypatch.setattr(guard.shutil, "which", lambda *_args, **_kwargs: None)
    assert guard.main([]) == 0
    assert capsys.readouterr().out == "instruction counts skipped: valgrind is not on the PATH\n"


def test_the_committed_record_has_every_pass():
    _, recorded = guard.read()
    assert len(recorded) == len(guard.SETS) * len(guard.DTYPES) * len(guard.PASSES)
    assert all(0.1 < recorded[f"avx2 {rest}"] < recorded[f"portable {rest}"]
               for rest in ("float32 statistics", "bfloat16 gradient"))  # fmt: skip
