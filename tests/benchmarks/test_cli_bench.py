"""gft bench and gft study hand over to modules of the source tree, or say where they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gft_kernels.cli import main, source_tree

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name, module", [("bench", "benchmarks"), ("study", "benchmarks.experiments")])
def test_it_runs_the_module_of_the_tree_in_the_callers_folder(monkeypatch, tmp_path, name, module):
    called = []
    monkeypatch.setattr(subprocess, "call", lambda command, env: called.append((command, env)) or 3)
    monkeypatch.chdir(tmp_path)
    assert main([name, "row", "--quick", "--save", "a.json"]) == 3
    ((command, environment),) = called
    assert command == [sys.executable, "-m", module, "row", "--quick", "--save", "a.json"]
    assert environment["PYTHONPATH"].split(":")[0] == str(ROOT)


def test_a_caller_in_the_source_tree_is_enough(monkeypatch, tmp_path):
    monkeypatch.setattr(source_tree, "__file__", str(tmp_path / "site" / "gft_kernels" / "cli" / "source_tree.py"))
    monkeypatch.chdir(ROOT)
    assert source_tree.source_tree() == ROOT


@pytest.mark.parametrize("name", ["bench", "study"])
def test_an_installed_package_says_in_a_sentence_where_they_are(monkeypatch, tmp_path, capsys, name):
    monkeypatch.setattr(source_tree, "__file__", str(tmp_path / "site" / "gft_kernels" / "cli" / "source_tree.py"))
    monkeypatch.chdir(tmp_path)
    assert main([name, "--quick"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "benchmarks/ of the gft_kernels source tree" in error


def test_the_benchmarks_own_help_answers():
    done = subprocess.run(
        [sys.executable, "-m", "gft_kernels.cli", "bench", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--compare" in done.stdout and "log-probs" in done.stdout
