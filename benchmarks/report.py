"""Results as a readable table and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from benchmarks import provenance, traffic
from benchmarks.harness import Outcome

FORMAT = 1


@dataclass(frozen=True)
class CaseResult:
    """One case: its inputs (everything needed to make them again) and everyone's outcome."""

    case: dict
    label: str
    input_bytes: int
    outcomes: list[Outcome]


@dataclass(frozen=True)
class Report:
    """One run of a benchmark."""

    benchmark: str
    clock: str
    rounds: int
    device: str
    commit: dict  # as it was when the run began: the tree may move on while it lasts
    results: list[CaseResult]

    def as_json(self) -> dict:
        return {
            "format": FORMAT,
            "benchmark": self.benchmark,
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


def header(device: str, clock: str, made: dict) -> str:
    """Machine, commit, allocator and clock, in two lines."""
    facts = provenance.machine(device)
    place = facts.get("gpu") or f"{facts['cpu']}, {facts['cores']} cores, {facts['torch_cpu_capability']}"
    dirty = " with uncommitted changes" if made["dirty"] else ""
    return f"{place}\ncommit {made['revision'][:12]}{dirty} · {provenance.allocator(device)} · {clock}"


def table(result: CaseResult, told: set[tuple[str, str]] | None = None) -> str:
    """One line for each contender that was timed, fastest first; then a sentence for each that was not.

    told: (name, sentence) pairs that earlier tables of the run have said already; they are left out and added to.
    """
    told = set() if told is None else told
    timed = sorted((o for o in result.outcomes if o.status == "timed"), key=lambda o: o.median_s)
    columns = ("contender", "median", "p10 – p90", "over floor", "extra memory", "error", "worst row", "")
    lines = [columns, *(_row(outcome, result.input_bytes) for outcome in timed)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    text = [result.label]
    for line in lines:
        figures = [cell.rjust(width) for cell, width in zip(line[1:-1], widths[1:-1], strict=True)]
        text.append("  " + "  ".join([line[0].ljust(widths[0]), *figures, line[-1]]).rstrip())
    untimed = [o for o in result.outcomes if o.status != "timed" and (o.name, o.why) not in told]
    told.update((o.name, o.why) for o in untimed)
    text += [f"  {o.name}: {o.status}: {o.why}" for o in untimed]
    return "\n".join(text)


def _row(outcome: Outcome, input_bytes: int) -> tuple[str, ...]:
    extra = "" if outcome.extra_bytes is None else f"{outcome.extra_bytes / input_bytes:.2f} × inputs"
    return (
        outcome.name,
        _duration(outcome.median_s),
        f"{_duration(outcome.p10_s)} – {_duration(outcome.p90_s)}",
        "" if outcome.over_floor is None else f"{outcome.over_floor:.2f}",
        extra,
        "" if outcome.error is None else f"{outcome.error:.0e}",
        "" if outcome.worst_row_error is None else f"{outcome.worst_row_error:.0e}",
        outcome.note or ("" if outcome.objective in (None, "gft") else f"objective: {outcome.objective}"),
    )


def _duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"
