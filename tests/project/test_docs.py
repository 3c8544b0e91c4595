"""README and docs: Python snippets run, top to bottom, one namespace a file; links, files and modules are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [p for p in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))] if "```python" in p.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "snippet"}
    for snippet in re.finditer(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
        line = page.read_text()[: snippet.start()].count("\n") + 1
        exec(compile("\n" * line + snippet[1], str(page), "exec"), namespace)


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))],
                         ids=lambda p: str(p.relative_to(ROOT)))  # fmt: skip
def test_links_point_at_files_that_are_there(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


WRITTEN = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("*/README.md")), *sorted(ROOT.glob("docs/**/*.md"))]
NAMES = pytest.mark.parametrize("page", WRITTEN, ids=lambda p: str(p.relative_to(ROOT)))
FILE = re.compile(
    r"(?<![\w./-])((?:tests|benchmarks|gft_kernels|examples|csrc|docs|python_api)/[\w/*⋆.-]*"
    r"\.(?:py|cpp|h|cu|cuh|yaml|md|json|jsonl|svg))\b"
)
DOTTED = re.compile(r"(?<![\w/@.-])gft_kernels((?:\.\w+)+)")


@NAMES
def test_files_named_on_pages_are_there(page):
    for name in FILE.findall(page.read_text()):
        if "FILE" not in name:  # a place for the reader's own
            assert list(ROOT.glob(name.replace("⋆", "*"))), f"{page.name} names {name}"


@NAMES
def test_modules_named_on_pages_are_there(page):
    """A dotted name is a module, or something in one; what a change renamed stands in the changelog alone."""
    if page.name == "CHANGELOG.md":
        return
    for name in DOTTED.findall(page.read_text()):
        parts = name.strip(".").split(".")
        roads = [ROOT.joinpath("gft_kernels", *parts[:end]) for end in (len(parts), len(parts) - 1)]
        assert any(road.is_dir() or road.with_suffix(".py").is_file() for road in roads), f"{page.name} names {name}"
