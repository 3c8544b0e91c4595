"""Python snippets in README and docs run, top to bottom, one namespace a file."""

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
