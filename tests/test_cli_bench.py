"""gft bench hands over to the benchmarks of the source tree, or says where they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from gft_kernels.cli import bench, main

ROOT = Path(__file__).parents[1]


def test_it_runs_the_benchmarks_of_the_tree_in_the_callers_folder(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(subprocess, "call", lambda command, env: called.append((command, env)) or 3)
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "row", "--quick", "--save", "a.json"]) == 3
    ((command, environment),) = called
    assert command == [sys.executable, "-m", "benchmarks", "row", "--quick", "--save", "a.json"]
    assert environment["PYTHONPATH"].split(":")[0] == str(ROOT)


def test_a_caller_in_the_source_tree_is_enough(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "site" / "gft_kernels" / "cli" / "bench.py"))
    monkeypatch.chdir(ROOT)
    assert bench.source_tree() == ROOT


def test_an_installed_package_says_in_a_sentence_where_they_are(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "site" / "gft_kernels" / "cli" / "bench.py"))
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--quick"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "benchmarks/ of the gft_kernels source tree" in error


def test_the_benchmarks_own_help_answers():
    done = subprocess.run(
        [sys.executable, "-m", "gft_kernels.cli", "bench", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--compare" in done.stdout and "log-probs" in done.stdout
