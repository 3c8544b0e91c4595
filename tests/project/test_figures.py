"""Every performance figure in the documentation comes from a result file, and says so (see figures.py)."""

from __future__ import annotations

import json
from pathlib import Path

import figures
import pytest

from benchmarks import committed, plots

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_figures_agree_with_their_result_files(page):
    wrong = [figures.disagreement(figure, RESULTS) for figure in figures.quoted(page.read_text())]
    assert not [sentence for sentence in wrong if sentence], "quote the figure as it was measured, or measure again"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_performance_figure_without_a_source(page):
    assert figures.unmarked(page.read_text()) == [], "name its source as tests/project/figures.py describes"


@pytest.mark.parametrize("plot", sorted(ROOT.glob("docs/**/*.svg")), ids=lambda p: p.name)
def test_plots_are_drawn_from_the_result_files_as_they_are(plot):
    drawn_from = plots.sources(plot)
    assert drawn_from, "a plot names the files it was drawn from"
    now = {name: plots.digest(RESULTS / name) for name in drawn_from}
    assert drawn_from == now, "python -m benchmarks.plots benchmarks/results/*.json, or gft study report"


def test_the_pages_name_the_command_of_every_result_file():
    assert {path.name for path in RESULTS.glob("*.json")} <= set(committed.COMMANDS)
    pages = (ROOT / "README.md").read_text() + (ROOT / "docs" / "benchmarks.md").read_text()
    for file, options in committed.COMMANDS.items():
        assert f"gft bench {options} --save {file}\n" in pages, file


# The rules themselves, on a page and a result file made for the purpose.

CASE = "64 × 1000 float32, 1 thread"


@pytest.fixture
def results(tmp_path):
    outcomes = [
        {"name": "ours, in place", "median_s": 0.02214, "extra_bytes": 1536 * 2**10, "over_floor": 1.872},
        {"name": "eager", "median_s": 0.1573, "extra_bytes": 3 * 2**30, "over_floor": None},
    ]
    report = {"rounds": 5, "share": 0.254, "results": [{"label": CASE, "outcomes": outcomes}]}
    (tmp_path / "row.json").write_text(json.dumps(report))
    return tmp_path


def wrong(page: str, results: Path) -> list[str]:
    return [s for s in (figures.disagreement(figure, results) for figure in figures.quoted(page)) if s]


OURS = f"row.json / {CASE} / ours, in place"


@pytest.mark.parametrize("text", [
    f"22.1 ms<!-- figure: {OURS} / median_s -->",
    f"**22 ms** <!-- figure: {OURS} / median_s -->",
    f"0.02 s\n<!-- figure: {OURS}\n / median_s -->",
    f"1.87 ×<!-- figure: {OURS} / over_floor --> the floor",
    f"1.5 MiB<!-- figure: {OURS} / extra_bytes -->",
    f"7.1 ×<!-- figure: row.json / {CASE} / eager ÷ ours, in place / median_s --> as long",
    "25 %<!-- figure: row.json / share --> of 5<!-- figure: row.json / rounds -->",
    "1.24 GB<!-- figure: 4096·151936·2 bytes -->",
])  # fmt: skip
def test_a_right_figure_passes(text, results):
    page = f"# Performance\n\nIt takes {text}."
    assert len(list(figures.quoted(page))) == text.count("<!--")
    assert wrong(page, results) == [] and figures.unmarked(page) == []


@pytest.mark.parametrize("text", [
    f"22.2 ms<!-- figure: {OURS} / median_s -->",
    f"22.1 s<!-- figure: {OURS} / median_s -->",
    f"22.1 MiB<!-- figure: {OURS} / median_s -->",
    f"7.2 ×<!-- figure: row.json / {CASE} / eager ÷ ours, in place / median_s -->",
    "1.25 GB<!-- figure: 4096·151936·2 bytes -->",
])  # fmt: skip
def test_a_wrong_figure_is_found(text, results):
    assert len(wrong(text, results)) == 1


@pytest.mark.parametrize("text, sentence", [
    ("5 ms<!-- figure: gone.json / rounds -->", "has no gone.json"),
    ("5 ms<!-- figure: row.json / 32 × 1000 float32 / eager / median_s -->", "is called '32 × 1000 float32'"),
    (f"5 ms<!-- figure: row.json / {CASE} / eager / over_floor -->", "not to a number"),
    (f"fast<!-- figure: {OURS} / median_s -->", "must follow a number"),
])  # fmt: skip
def test_a_source_that_is_not_there_is_an_error(text, sentence, results):
    with pytest.raises(ValueError, match=sentence):
        wrong(text, results)


TABLE = """## Speed

| contender | time | memory (MiB) | note |
|---|---:|---:|---|
| `ours, in place` | **22.1 ms** | 1.5 | AVX-512 |
| eager | 157 ms | 3072 | |
"""
COLUMNS = f"""
<!-- figures: row.json / {CASE} / {{row}}
time: median_s
memory: extra_bytes
-->
"""


def test_a_table_names_the_source_of_its_columns(results):
    assert wrong(TABLE + COLUMNS, results) == [] and figures.unmarked(TABLE + COLUMNS) == []
    assert len(list(figures.quoted(TABLE + COLUMNS))) == 4
    assert len(wrong(TABLE.replace("157", "158").replace("3072", "3073") + COLUMNS, results)) == 2


def test_a_table_without_a_source_is_found():
    assert figures.unmarked(TABLE) == ["line 5: 22.1 ms", "line 6: 157 ms"]


def test_a_column_that_is_not_there_is_an_error(results):
    with pytest.raises(ValueError, match="no column 'error'"):
        wrong(TABLE + COLUMNS.replace("memory:", "error:"), results)


def test_figures_are_rewritten_as_they_were_shown(results):
    page = TABLE + COLUMNS + f"\n## Speed\n\n**21.4 ms** <!-- figure: {OURS} / median_s -->, 22.1 ms as it is.\n"
    stale = page.replace("| 157 ms", "| 1 ms").replace("| 1.5 |", "| 99.9 |").replace("3072", "1,000")
    assert len(wrong(stale, results)) == 4
    fresh = figures.rewritten(stale, results)
    assert fresh == page.replace("21.4", "22.1").replace("3072", "3,072") and wrong(fresh, results) == []


@pytest.mark.parametrize("number", ["3 ms", "2.5 ×", "7 times faster", "1,024 MiB", "4 GB", "12 %", "0.5 s"])
@pytest.mark.parametrize("heading", ["# Performance", "## Measured on a CPU", "### Memory"])
def test_a_number_with_a_unit_needs_a_source_where_performance_is_the_subject(heading, number):
    assert len(figures.unmarked(f"{heading}\n\nIt is {number} here.\n")) == 1


@pytest.mark.parametrize("page", [
    "# Installation\n\nIt takes 40 s.\n",  # another subject
    "## Speed\n\nA shape of 64 × 151,936, τ = 0.7, three rounds.\n",  # a shape, a number without unit
    "## Speed\n\n```\n3 ms\n```\nand `3 ms`\n",  # code
    "## Speed\n\nFast.\n\n## Use\n\nIt takes 40 s.\n",  # the section has ended
])  # fmt: skip
def test_other_numbers_need_none(page):
    assert figures.unmarked(page) == []
