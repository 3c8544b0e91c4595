"""Results: the table on the screen, the JSON file, and who won a case."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path

from benchmarks import provenance
from benchmarks.harness import Outcome
from benchmarks.kinds import KINDS
from benchmarks.kinds.kind import OURS

FORMAT = 2
DIGITS = 4
"""Significant digits of a time in a file: spreads are far larger."""
TRAFFIC_MODEL = (
    "pass = rows·vocab·itemsize bytes; floor: 1 read + 1 write; statistics then gradient: 2 reads + 1 write; "
    "the paper's own formulation: about 8 reads + 6 writes; linear: 6·rows·hidden·vocab FLOP (three products)"
)


@dataclass(frozen=True)
class CaseResult:
    """One case: its kind, its inputs (everything needed to make them again) and everyone's outcome."""

    benchmark: str
    case: dict
    label: str
    input_bytes: int
    outcomes: list[Outcome]


@dataclass
class Report:
    """One run. Commit and load are as they were when it began: the tree may move on while it lasts."""

    command: str  # that made it
    clock: str
    rounds: int
    device: str = "cpu"
    results: list[CaseResult] = field(default_factory=list)
    commit: dict = field(default_factory=provenance.commit)
    load_average: float | None = field(default_factory=provenance.load_average)

    def header(self) -> str:
        """Machine, commit, allocator and clock, in two lines; in a third, that others use the machine, if they do."""
        facts, load = provenance.machine(self.device), self.load_average
        place = facts.get("gpu") or f"{facts['cpu']}, {facts['cores']} cores, {facts['torch_cpu_capability']}"
        dirty = " with uncommitted changes" if self.commit["dirty"] else ""
        made = f"commit {self.commit['revision'][:12]}{dirty} · {provenance.allocator(self.device)} · {self.clock}"
        if load is not None and load > facts["cores"]:
            made += f"\nthe machine is busy (load {load:.1f} on {facts['cores']} cores): its times say little"
        return f"{place}\n{made}"

    def as_json(self) -> dict:
        return {
            "format": FORMAT,
            "command": self.command,
            "taken": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "load_average": self.load_average,
            "commit": self.commit,
            "machine": provenance.machine(self.device),
            "versions": provenance.versions(),
            "allocator": provenance.allocator(self.device),
            "clock": self.clock,
            "rounds": self.rounds,
            "traffic_model": TRAFFIC_MODEL,
            "results": [asdict(result) for result in self.results],
        }

    def save(self, path: Path) -> None:
        write(path, self.as_json())


def write(path: Path, saved: dict) -> None:
    """A report as a file: a line an outcome, without what a case or an outcome has by default."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({key: value for key, value in saved.items() if key != "results"}, indent=1, ensure_ascii=False)
    results = []
    for result in saved["results"]:
        case = _without_defaults(KINDS[result["benchmark"]].case, result["case"])
        lines = [_line(_without_defaults(Outcome, outcome)) for outcome in result["outcomes"]]
        result = {**result, "case": case}
        del result["outcomes"]
        results.append(_line(result)[:-1] + ', "outcomes": [\n  ' + ",\n  ".join(lines) + "\n ]}")
    scratch = path.with_name(f".{path.name}")  # whole or not at all
    scratch.write_text(head[: head.rindex("\n}")] + ',\n "results": [\n ' + ",\n ".join(results) + "\n]}\n")
    scratch.replace(path)


def _without_defaults(kind: type, values: dict) -> dict:
    defaults = {f.name: f.default_factory() if f.default is MISSING and f.default_factory is not MISSING else f.default
                for f in fields(kind)}  # fmt: skip
    return {key: value for key, value in values.items() if value != defaults[key]}


def _line(values: dict) -> str:
    short = {k: float(f"{v:.{DIGITS}g}") if isinstance(v, float) else v for k, v in values.items()}
    return json.dumps(short, ensure_ascii=False)


def load(path: Path) -> dict:
    """A saved report, every case and outcome with all of its fields."""
    saved = json.loads(path.read_text())
    for result in saved["results"]:
        result["case"] = asdict(KINDS[result["benchmark"]].case(**result["case"]))
        result["outcomes"] = [asdict(Outcome(**outcome)) for outcome in result["outcomes"]]
    return saved


# Who won. Outcomes are dictionaries here, as they are saved.


def timed(result: dict) -> list[dict]:
    """The outcomes of a case that have a time."""
    return [outcome for outcome in result["outcomes"] if outcome["status"] == "timed"]


def is_ours(outcome: dict) -> bool:
    return outcome["name"].startswith(OURS)


def best_of_ours(result: dict) -> dict | None:
    """Our fastest entry in a case."""
    return min((o for o in timed(result) if is_ours(o)), key=lambda o: o["median_s"], default=None)


def winner_over_us(result: dict) -> dict | None:
    """The fastest of the others if it beat our best entry; floors do not count, other objectives do."""
    ours = best_of_ours(result)
    others = [o for o in timed(result) if o["objective"] is not None and not is_ours(o)]
    best = min(others, key=lambda o: o["median_s"], default=None)
    return best if ours and best and best["median_s"] < ours["median_s"] else None


# The table.

COLUMNS = ("contender", "median", "p10 – p90", "over floor", "extra memory", "error", "worst row", "")


def table(result: dict, told: set[tuple[str, str]] | None = None) -> str:
    """One line for each contender that was timed, fastest first; then a sentence for each that was not.

    result: a CaseResult as a dictionary. Where someone else was faster, our best entry says so and is red on a screen.
    told: (name, sentence) pairs that earlier tables of the run have said already; they are left out and added to.
    """
    told = set() if told is None else told
    ranked = sorted(timed(result), key=lambda o: o["median_s"])
    winner = winner_over_us(result)
    beaten = best_of_ours(result) if winner else None
    ours = next((o["objective"] for o in ranked if is_ours(o)), "gft")
    lines = [COLUMNS]
    for o in ranked:
        words = [f"slower than {winner['name']}"] if o is beaten else []
        words += [f"objective: {o['objective']}"] if o["objective"] not in (None, ours) else []
        words += [f"at most {o['longest_tokens']} tokens in {o['budget_bytes'] >> 20} MiB"] if o["budget_bytes"] else []
        words += [o["note"]] if o["note"] else []
        lines.append(_row(o, result["input_bytes"], "; ".join(words)))
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    text = [result["label"]]
    for line, outcome in zip(lines, [None, *ranked], strict=True):
        figures = [cell.rjust(width) for cell, width in zip(line[1:-1], widths[1:-1], strict=True)]
        shown = "  " + "  ".join([line[0].ljust(widths[0]), *figures, line[-1]]).rstrip()
        text.append(_red(shown) if outcome is not None and outcome is beaten else shown)
    untimed = [o for o in result["outcomes"] if o["status"] != "timed" and (o["name"], o["why"]) not in told]
    told.update((o["name"], o["why"]) for o in untimed)
    return "\n".join(text + [f"  {o['name']}: {o['status']}: {o['why']}" for o in untimed])


def _row(o: dict, input_bytes: int, words: str) -> tuple[str, ...]:
    return (
        o["name"],
        duration(o["median_s"]),
        f"{duration(o['p10_s'])} – {duration(o['p90_s'])}",
        "" if o["over_floor"] is None else f"{o['over_floor']:.2f}",
        "" if o["extra_bytes"] is None else f"{o['extra_bytes'] / input_bytes:.2f} × inputs",
        "" if o["error"] is None else f"{o['error']:.0e}",
        "" if o["worst_row_error"] is None else f"{o['worst_row_error']:.0e}",
        words,
    )


def _red(line: str) -> str:
    """Red on a terminal, or where FORCE_COLOR asks for it; NO_COLOR forbids it (no-color.org, force-color.org)."""
    wanted = sys.stdout.isatty() or os.environ.get("FORCE_COLOR")
    return f"\033[31m{line}\033[0m" if wanted and not os.environ.get("NO_COLOR") else line


def duration(seconds: float) -> str:
    scale, unit = next((s, u) for s, u in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")) if seconds >= s or u == "µs")
    return f"{seconds / scale:.3g} {unit}"
