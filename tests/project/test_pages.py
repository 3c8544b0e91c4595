"""Every performance figure in the documentation stands in a block that is generated from a result file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import pages, plots
from benchmarks.experiments.results import PACKED

ROOT = Path(__file__).parents[2]
PAGES = pytest.mark.parametrize("page", pages.pages(), ids=lambda p: str(p.relative_to(ROOT)))

NUMBER = r"(?<![\w.,])[-−]?\d[\d,]*(?:\.\d+)?"
UNITS = "ns|µs|ms|s|min|bytes|KB|MB|GB|TB|KiB|MiB|GiB|×|times|%"
FIGURE = re.compile(rf"{NUMBER}[ \u00a0\u202f]?(?:{UNITS})(?![\w/])(?!\s*\d)")
PERFORMANCE = re.compile(r"\b(performance|speed|benchmarks?|measure[ds]?|measurements?|timings?|memory)\b", re.I)


def typed_by_hand(page: str) -> list[str]:
    """Numbers with a unit in sections on performance, outside code and generated blocks; shapes do not count."""
    text = re.sub(r"^```.*?^```|`[^`\n]*`|<!-- generated.*?<!-- end -->", "", page, flags=re.M | re.S)
    headings = [(m.start(), len(m[1]), m[2]) for m in re.finditer(r"^(#+) (.*)$", text, re.M)]
    found: dict[int, str] = {}
    for start, level, title in headings:
        if PERFORMANCE.search(title):
            begin = start + level + len(title)
            end = next((other for other, depth, _ in headings if other > start and depth <= level), len(text))
            found |= {m.start(): m[0] for m in FIGURE.finditer(text, begin, end)}
    return list(found.values())


@PAGES
def test_blocks_say_what_the_results_say(page):
    assert pages.rewritten(page.read_text()) == page.read_text(), "run python -m benchmarks.pages"


@PAGES
def test_no_figure_is_typed_by_hand(page):
    assert typed_by_hand(page.read_text()) == [], "put it into a block of benchmarks/pages.py"


@pytest.mark.parametrize("plot", sorted(ROOT.glob("docs/**/*.svg")), ids=lambda p: p.name)
def test_plots_are_drawn_from_the_result_files_as_they_are(plot):
    drawn_from = plots.sources(plot)
    assert drawn_from, "a plot names the files it was drawn from"
    for name, digest in drawn_from.items():
        file = next(folder / name for folder in (pages.RESULTS, PACKED) if (folder / name).exists())
        assert plots.digest(file) == digest, "make docs draws it anew"
    assert plot.stat().st_size < 40_000


@PAGES
def test_whether_a_gpu_was_measured_is_said_in_blocks_alone(page):
    by_hand = pages.BLOCK.sub("", page.read_text())
    assert not re.search(r"not\s+(yet\s+)?measured\s+on\s+a\s+GPU", by_hand, re.I), "it is untrue once it was"


def test_every_block_is_on_a_page_and_every_name_on_a_page_is_a_block():
    text = "".join(page.read_text() for page in pages.pages())
    assert sorted(match["name"] for match in pages.BLOCK.finditer(text)) == sorted(pages.BLOCKS)
    with pytest.raises(ValueError, match="got 'rwo'"):
        pages.rewritten("<!-- generated: rwo -->\n<!-- end -->")


def test_a_stale_block_is_rewritten_and_nothing_else():
    page = "before\n<!-- generated: commands -->\n{}<!-- end -->\nafter 3 ms\n"
    assert pages.rewritten(page.format("1 ms\n")) == page.format(pages.BLOCKS["commands"]())


@pytest.mark.parametrize("number", ["3 ms", "2.5 ×", "7 times faster", "1,024 MiB", "4 GB", "12 %", "0.5 s"])
@pytest.mark.parametrize("heading", ["# Performance", "## Measured on a CPU", "### Memory"])
def test_a_number_with_a_unit_is_found_where_performance_is_the_subject(heading, number):
    assert len(typed_by_hand(f"{heading}\n\nIt is {number} here.\n")) == 1


@pytest.mark.parametrize("page", [
    "# Installation\n\nIt takes 40 s.\n",  # another subject
    "## Speed\n\nA shape of 64 × 151,936, τ = 0.7, three rounds.\n",  # a shape, a number without unit
    "## Speed\n\n```\n3 ms\n```\nand `3 ms`\n",  # code
    "## Speed\n\n<!-- generated: row -->\n3 ms\n<!-- end -->\n",
    "## Speed\n\nFast.\n\n## Use\n\nIt takes 40 s.\n",  # the section has ended
])  # fmt: skip
def test_other_numbers_are_not(page):
    assert typed_by_hand(page) == []
