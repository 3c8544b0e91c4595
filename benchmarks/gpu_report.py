"""What was measured on a GPU, as blocks of the pages.

From the files that a run of benchmarks.gpu left, put into results/ with the card's name: row-h200.json for its row.json
and so on, each of which may be missing. `python -m benchmarks.pages` then says on every page what they hold.
"""

from __future__ import annotations

import itertools
import re
import shlex

from benchmarks import report
from benchmarks.gpu import traffic
from benchmarks.gpu.programs import lines_of
from benchmarks.tables import RESULTS, duration, markdown, over_floor, ranked, table, timed_columns

CARD = "h200"
KINDS = {
    "row": "**Loss over logits.** The floor reads and writes the logits once.",
    "linear": "**Loss over hidden states.** The floor is the three bare products.",
    "small": "**Few rows**, replayed as CUDA graphs.",
}
"""The files of benchmarks, and what is said above their tables."""
NOTHING = "**Not yet measured on a GPU.** `make gpu RESULTS=folder` does it on a machine that has one.\n"


def saved() -> dict[str, dict]:
    """The reports that are there, by kind."""
    paths = {kind: RESULTS / f"{kind}-{CARD}.json" for kind in KINDS}
    return {kind: report.load(path) for kind, path in paths.items() if path.exists()}


def short() -> str:
    """The front page's: everyone at the headline shape of each dtype."""
    row = saved().get("row")
    if row is None:
        return NOTHING
    first: dict[str, dict] = {}
    for result in row["results"]:
        first.setdefault(result["case"]["dtype"], result)
    columns = [column for result in first.values() for column in timed_columns(_title(result), ranked(result))]
    said = f"On a GPU: loss and gradient on one {row['machine']['gpu']}; {_versions(row)}; {_how(row)}.\n"
    return f"{said}\n{table(columns)}\n{_lost(row)}{_left_out(row)}"


def whole() -> str:
    """Every table, where it comes from, and the cases that are lost."""
    reports = saved()
    if not reports:
        return NOTHING
    parts = [_place(next(iter(reports.values())))]
    parts += [_section(KINDS[kind], one) for kind, one in reports.items()]
    return "\n".join(filter(None, [*parts, _traffic(), _checks()]))


def _title(result: dict) -> str:
    """A case's label without the word that all of them share."""
    return result["label"].removesuffix(" peaked")


def _how(one: dict) -> str:
    return f"{one['clock']}, medians of {one['rounds']} interleaved rounds, commit {one['commit']['revision'][:12]}"


def _place(one: dict) -> str:
    machine = one["machine"]
    return (
        f"One {machine['gpu']}: {machine['multiprocessors']} multiprocessors, compute capability "
        f"{machine['compute_capability']}, CUDA {machine['cuda']}; {_versions(one)}.\n"
    )


def _versions(one: dict) -> str:
    return ", ".join(f"{name} {version}" for name, version in one["versions"].items() if version != "absent")


def _section(words: str, one: dict) -> str:
    def shown(outcome: dict) -> str:
        return f"{duration(outcome)} ({over_floor(outcome)})"

    columns = [(_title(result), ranked(result), shown) for result in one["results"]]
    said = f"{words} Time, and in brackets times the floor; {_how(one)}.\n"
    return f"{said}\n{table(columns)}\n{_lost(one)}{_left_out(one)}{_untimed(one)}"


def _lost(one: dict) -> str:
    """The cases in which anyone else is faster than our best entry, whatever they compute."""
    lines = []
    for result in one["results"]:
        ours, winner = report.best_of_ours(result), report.winner_over_us(result)
        if ours and winner:
            times = ours["median_s"] / winner["median_s"]
            lines.append(f"- **Slower** at {_title(result)}: {winner['name']} is {times:.2f} times as fast.\n")
    return "".join(lines) or "Nobody was faster than our best entry in any case.\n"


def _left_out(one: dict) -> str:
    """Whom the command did not ask for."""
    words = shlex.split(one["command"])
    skipped = [f"`{name}`" for option, name in itertools.pairwise(words) if option == "--skip"]
    return f"- Left out by the command: {', '.join(skipped)}.\n" if skipped else ""


def _untimed(one: dict) -> str:
    """Who could not be timed, each with its reason once."""
    told = {o["name"]: o for result in reversed(one["results"]) for o in result["outcomes"] if o["status"] != "timed"}
    return "".join(f"- {name}: {o['status']}: {o['why']}.\n" for name, o in told.items())


def _lines(profile: str) -> list[dict]:
    return lines_of(RESULTS / f"{profile}-{CARD}.jsonl")


def _traffic() -> str:
    rows = []
    for line in _lines("speed"):
        for launch in line.get("launches", ()):
            if launch.keys() >= {*traffic.METRICS.values(), "passes"}:
                kernel = re.sub(r"^void |\w+::|\(.*", "", launch["kernel"])
                speed = (launch["read_bytes"] + launch["written_bytes"]) / launch["nanoseconds"] / 1e3
                rows.append([line["case"], f"`{kernel}`", f"{launch['passes']:.2f}", f"{speed:.2f} TB/s",
                             f"{launch['issue_active_percent']:.0f} %"])  # fmt: skip
    head = ["", "kernel", "passes over the logits (floor: 2)", "DRAM traffic", "issue slots"]
    return f"**What moved**, by Nsight Compute, forward in place:\n\n{markdown(head, rows)}" if rows else ""


def _checks() -> str:
    """What the correctness run said: outcomes of its tests, and of the sanitizers."""
    said = []
    for line in _lines("correctness"):
        counts = ", ".join(f"{number} {outcome}" for outcome, number in line.get("tests", {}).items())
        said.append(f"{line['stage']}: {counts or line['outcome']}")
    return f"**Checked there:** {'; '.join(said)}.\n" if said else ""
