"""The verdicts on the committed page against a re-computation by another script with other libraries (recompute.py)."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import runpy
from pathlib import Path

import pytest

from benchmarks.experiments import claims, results, settings, verdicts

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


def is_found_again(line: list[str], row: dict) -> None:
    """A line of a page's table against a recomputed row; drawn ones as far as 10,000 draws are repeatable."""
    pairs = line[4].split(" of ")[0]
    assert (line[0], line[3], pairs) == (row["claim"], str(row["bases"]), str(row["pairs"]))
    if row.get("drawn"):
        value, low, high = (float(number) for number in re.findall(r"[+-]\d\.\d+", line[2]))
        near = pytest.approx((row["value"], row["low"], row["high"]), abs=2e-3 + 0.05 * (row["high"] - row["low"]))
        assert (value, low, high) == near
        assert float(line[5]) == pytest.approx(row["p"], rel=0.2, abs=4e-3)
        assert line[7] == row["said"] or 0.03 < row["p"] < 0.07, line
        return
    assert (line[2], line[7]) == (shown(row), row["said"]), line
    assert line[5] == "–" if row["p"] != row["p"] else float(line[5]) == pytest.approx(row["p"], rel=6e-3)


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
            is_found_again(line, row)
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
        decidable = [entry["claim"] for entry in RECOMPUTE["claims_of"](path) if entry.get("pairs")]
        assert [line[0] for line in lines] == decidable
        for line in lines:
            assert line[column] == found.get(line[0], "–"), (title, line[0])


def test_a_bootstrap_over_seeds_and_prompts_is_found_again(tmp_path):
    study, chance, lines = settings.load("smollm2"), random.Random(5), []
    odds = {"gft": 0.7, "sft-mix": 0.5, "grpo-4": 0.69, "gft-positive-same": 0.72, "gft-given": 0.66, "none": 0.4}
    for chain, odd in odds.items():
        for seed in range(5):
            right = [sum(chance.random() < odd for _ in range(2)) for _ in range(64)]
            ways = [min(n, 1 + seed % 2) for n in right]
            metrics = {"pass_at": {"1": sum(right) / 128}, "distinct": sum(ways) / 64, "kl": 0.0, "retention": 0.0,
                       "right_of_each": right, "distinct_of_each": ways}  # fmt: skip
            expert = study.expert_of(chain, "json")
            lines.append({"kind": "run", "chain": chain, "expert": expert, "base": 0, "seed": seed, "metrics": metrics})
    lines.append(lines[-1] | {"kind": "base", "chain": "", "expert": None, "seed": 0})
    study = dataclasses.replace(study, evaluation=dataclasses.replace(study.evaluation, prompts=64))
    head = {"study": study.as_dict(), "source": {}, "claims": {"entries": claims.read("smollm2")}}
    path = tmp_path / "smollm2.jsonl"
    path.write_text("\n".join(map(json.dumps, [head, *lines])))
    printed = verdicts.full_table(results.read(path), "json").splitlines()[2:]
    rows = RECOMPUTE["verdicts"](path, "json")
    assert all(row.get("drawn") for row in rows) and len({row["said"] for row in rows}) > 1
    for line, row in zip(printed, rows, strict=True):
        is_found_again(cells(line), row)
