"""Results as a readable table and as JSON."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from benchmarks import provenance, traffic, verdicts
from benchmarks.harness import Outcome
from benchmarks.kinds import KINDS

FORMAT = 1


@dataclass(frozen=True)
class CaseResult:
    """One case: its kind, its inputs (everything needed to make them again) and everyone's outcome."""

    benchmark: str
    case: dict
    label: str
    input_bytes: int
    outcomes: list[Outcome]


@dataclass(frozen=True)
class Report:
    """One run of a benchmark, or of several."""

    benchmark: str
    clock: str
    rounds: int
    device: str
    commit: dict  # as it was when the run began: the tree may move on while it lasts
    command: str  # that made it
    load_average: float | None  # when it began: more than the number of cores says that others were at work
    results: list[CaseResult]

    def as_json(self) -> dict:
        return {
            "format": FORMAT,
            "benchmark": self.benchmark,
            "command": self.command,
            "load_average": self.load_average,
            "taken": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": self.commit,
            "machine": provenance.machine(self.device),
            "versions": provenance.versions(),
            "allocator": provenance.allocator(self.device),
            "clock": self.clock,
            "rounds": self.rounds,
            "traffic_model": traffic.MODEL,
            "results": [asdict(result) for result in self.results],
        }

    def save(self, path: str | Path) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(self.as_json(), indent=1) + "\n")


def load(path: Path) -> dict:
    """A saved report. A file older than a field of its cases gets the field's default: that is what was measured."""
    saved = json.loads(path.read_text())
    for result in saved["results"]:
        kind = result.setdefault("benchmark", saved["benchmark"])
        result["case"] = asdict(KINDS[kind].case(**result["case"]))
    return saved


def header(device: str, clock: str, made: dict, load: float | None) -> str:
    """Machine, commit, allocator and clock, in two lines; in a third, that others use the machine, if they do."""
    facts = provenance.machine(device)
    place = facts.get("gpu") or f"{facts['cpu']}, {facts['cores']} cores, {facts['torch_cpu_capability']}"
    dirty = " with uncommitted changes" if made["dirty"] else ""
    lines = f"{place}\ncommit {made['revision'][:12]}{dirty} · {provenance.allocator(device)} · {clock}"
    if load is not None and load > facts["cores"]:
        lines += f"\nthe machine is busy (load {load:.1f} on {facts['cores']} cores): its times say little"
    return lines


def table(result: dict, told: set[tuple[str, str]] | None = None) -> str:
    """One line for each contender that was timed, fastest first; then a sentence for each that was not.

    result: a CaseResult as a dictionary. Where someone else was faster, our best entry says so and is red on a screen.
    told: (name, sentence) pairs that earlier tables of the run have said already; they are left out and added to.
    """
    told = set() if told is None else told
    timed = sorted(verdicts.timed(result), key=lambda o: o["median_s"])
    winner = verdicts.winner_over_us(result)
    beaten = verdicts.best_of_ours(result) if winner else None
    ours = next((o["objective"] for o in timed if verdicts.is_ours(o)), "gft")
    lines = [COLUMNS]
    for o in timed:
        words = [f"slower than {winner['name']}"] if o is beaten else []
        words += [f"objective: {o['objective']}"] if o["objective"] not in (None, ours) else []
        words += [f"at most {o['longest_tokens']} tokens in {o['budget_bytes'] >> 20} MiB"] if o["budget_bytes"] else []
        words += [o["note"]] if o["note"] else []
        lines.append(_row(o, result["input_bytes"], "; ".join(words)))
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    text = [result["label"]]
    for line, outcome in zip(lines, [None, *timed], strict=True):
        figures = [cell.rjust(width) for cell, width in zip(line[1:-1], widths[1:-1], strict=True)]
        shown = "  " + "  ".join([line[0].ljust(widths[0]), *figures, line[-1]]).rstrip()
        text.append(_red(shown) if outcome is not None and outcome is beaten else shown)
    untimed = [o for o in result["outcomes"] if o["status"] != "timed" and (o["name"], o["why"]) not in told]
    told.update((o["name"], o["why"]) for o in untimed)
    return "\n".join(text + [f"  {o['name']}: {o['status']}: {o['why']}" for o in untimed])


COLUMNS = ("contender", "median", "p10 – p90", "over floor", "extra memory", "error", "worst row", "")


def _row(o: dict, input_bytes: int, words: str) -> tuple[str, ...]:
    return (
        o["name"],
        _duration(o["median_s"]),
        f"{_duration(o['p10_s'])} – {_duration(o['p90_s'])}",
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


def _duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"
