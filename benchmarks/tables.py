"""Tables of the pages: a row a contender, a column a figure of a case; from the files in results/."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

from benchmarks import report

RESULTS = Path(__file__).parent / "results"


@cache
def cases(file: str) -> dict[str, dict]:
    return {result["label"]: result for result in report.load(RESULTS / file)["results"]}


def outcomes(file: str, label: str) -> dict[str, dict]:
    return ranked(cases(file)[label])


def ranked(result: dict) -> dict[str, dict]:
    """Everyone who was timed in a case, by name; the floor first, then the fastest."""
    found = sorted(report.timed(result), key=lambda o: (o["objective"] is not None, o["median_s"]))
    return {outcome["name"]: outcome for outcome in found}


# How a figure is shown.


def duration(outcome: dict) -> str:
    return report.duration(outcome["median_s"])


def over_floor(outcome: dict) -> str:
    return f"{outcome['over_floor']:.2f}"


def error(outcome: dict) -> str:
    return f"{outcome['error']:.0e}" if outcome["error"] is not None else "–"


def megabytes(outcome: dict) -> str:
    if outcome["extra_bytes"] is None:
        return "–"
    value = outcome["extra_bytes"] / 1e6
    return f"{value:.0f} MB" if value >= 10 else f"{value:.2f} MB"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], align: str = "l") -> str:
    """A table. align: l or r of each column; the last letter counts for the columns after it as well."""
    sides = align.ljust(len(head), align[-1])
    lines = ["|" + "|".join(f" {title} " if title else " " for title in head) + "|"]
    lines.append("|" + "".join("---:|" if side == "r" else "---|" for side in sides))
    lines += ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join(lines) + "\n"


Column = tuple[str, dict[str, dict], Callable[[dict], str]]  # title, outcomes by name, what is shown


def table(columns: Sequence[Column]) -> str:
    """A row a contender, as the first column orders them; what computes something else than ours says so."""
    rows = []
    everyone = {name: outcome for _, found, _ in reversed(columns) for name, outcome in found.items()}
    for name in dict.fromkeys(name for _, found, _ in columns for name in found):
        objective = everyone[name]["objective"]
        other = f" ({objective})" if objective in ("cross-entropy", "grpo") else ""
        rows.append([name + other, *(shown(found[name]) if name in found else "–" for _, found, shown in columns)])
    return markdown(["", *(title for title, _, _ in columns)], rows)


def timed_columns(title: str, found: dict[str, dict]) -> list[Column]:
    return [(title, found, duration), ("over the floor", found, over_floor)]
