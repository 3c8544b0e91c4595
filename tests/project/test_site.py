"""The documentation site: the reference page is the generated one, and the navigation knows every page."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import yaml

import gft_kernels

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("generate_api", ROOT / "docs" / "generate_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_page_is_the_generated_one(generator):
    assert generator.PAGE.read_text() == generator.page(), "run python docs/generate_api.py"


def test_every_public_name_has_an_entry_with_a_docstring(generator):
    text = generator.page()
    for name in gft_kernels.__all__:
        section = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        prose = section.split("```")[-1].strip()
        assert prose, f"{name} has no docstring"


def test_sections_become_lists_with_links(generator):
    written = """One sentence.

Args:
    tau, eps: numbers, the second
        on the next line.
    those left out: as elsewhere.

Returns: a scalar.
Source: docs/formulas.md#F4; elsewhere."""
    shown = """One sentence.

**Args.**

- `tau`, `eps`: numbers, the second
  on the next line.
- those left out: as elsewhere.

**Returns.** a scalar.

**Source.** [formulas.md#F4](formulas.md#F4); elsewhere."""
    assert generator.markdown(written) == shown


def test_signatures_keep_the_quotes_of_strings(generator):
    assert '    rectify: str | None = "all",' in generator.signature("gft_loss", gft_kernels.gft_loss).splitlines()


def pages(navigation) -> list[str]:
    if isinstance(navigation, str):
        return [navigation]
    entries = navigation.values() if isinstance(navigation, dict) else navigation
    return [page for entry in entries for page in pages(entry)]


def test_the_navigation_knows_every_page():
    navigation = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    present = [path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")]
    assert sorted(navigation) == sorted(present), "list each page of docs/ once in mkdocs.yml"
