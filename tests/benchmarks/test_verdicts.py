"""The verdicts on the committed page against a re-computation by another script with other libraries (recompute.py)."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "experiments.md"
RECOMPUTE = runpy.run_path(str(Path(__file__).with_name("recompute.py")))
STUDIES = sorted(RECOMPUTE["RESULTS"].glob("*.jsonl"))


def section(name: str) -> str:
    return PAGE.read_text(encoding="utf-8").split(f"## Study: {name}\n")[1].split("\n## ")[0]


def cells(line: str) -> list[str]:
    return [cell.strip().replace("**", "") for cell in line.strip("|\n").split("|")]


def rows_after(text: str, heading: str) -> list[list[str]]:
    table = text.split(heading)[1].lstrip("\n").split("\n\n")[0]
    return [cells(line) for line in table.splitlines()[2:]]


def shown(row: dict) -> str:
    interval = f" [{row['low']:+.3f}, {row['high']:+.3f}]" if row["bases"] > 1 else ""
    return f"{row['value']:+.3f}{interval}" if row["bases"] else "–"


def summary(rows: list[dict]) -> dict[str, str]:
    """The one word of a claim, or how many of its comparisons said what."""
    found = {}
    for claim in dict.fromkeys(row["claim"] for row in rows):
        words = [row["said"] for row in rows if row["claim"] == claim]
        made = [word for word in words if word != "not testable here"]
        text = "; ".join(f"{w} in {made.count(w)} of {len(made)}" for w in dict.fromkeys(made))
        text = made[0] if len(set(made)) == 1 else text or "not testable here"
        missing = f"; compared with {len(made)} of {len(words)} planned"
        found[claim] = text + (missing if made and len(made) < len(words) else "")
    return found


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_verdict_is_found_again(path):
    text = section(path.stem)
    experts = re.findall(r"^Expert `(\w+)`:$", text, re.MULTILINE)
    assert experts
    for expert in experts:
        printed = rows_after(text, f"Expert `{expert}`:\n")
        for line, row in zip(printed, RECOMPUTE["verdicts"](path, expert), strict=True):
            pairs = line[4].split(" of ")[0]
            assert (line[0], line[2], line[3], pairs) == (
                row["claim"],
                shown(row),
                str(row["bases"]),
                str(row["pairs"]),
            )
            assert line[7] == row["said"], line
            assert line[5] == "–" if row["p"] != row["p"] else float(line[5]) == pytest.approx(row["p"], rel=6e-3)
        if len(printed[0]) > 8:
            for line, row in zip(printed, RECOMPUTE["verdicts"](path, expert, weak=True), strict=True):
                assert line[8] in ("no runs", f"{shown(row)}, {row['bases']} bases: {row['said']}"), line


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_summary_says_what_its_comparisons_say_now_and_said_at_first(path):
    text = section(path.stem)
    [header] = re.findall(r"^\| claim \| origin \|.*$", text, re.MULTILINE)
    for column, title in list(enumerate(cells(header)))[2:]:
        expert, first = title.split("`")[1], "at first" in title
        found = summary(RECOMPUTE["verdicts"](path, expert, first=first))
        lines = [cells(line) for line in text.split(header)[1].split("\n\n")[0].splitlines()[2:]]
        assert len(lines) > 5
        for line in lines:
            assert line[column] == found.get(line[0], "–"), (title, line[0])
