"""What `python -m benchmarks.extraction` found, as table and plot of the pages; before its first run, its command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.tables import markdown
from gft_kernels.cli.held_out import TEMPERATURES, interval

FILE = Path(__file__).parent / "results" / "extraction.jsonl"
NOT_RUN = "**Not yet run**: `python -m benchmarks.extraction --seed 0`, and so with other seeds.\n"


def read(file: Path = FILE) -> list[dict[str, Any]]:
    """A line for each trainer and seed; none before the first run."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def keep(found: dict[str, Any], file: Path = FILE) -> None:
    """Writes a result, in place of an earlier one of the same trainer and seed."""
    others = [line for line in read(file) if (line["trainer"], line["seed"]) != (found["trainer"], found["seed"])]
    lines = sorted([*others, found], key=lambda line: (line["trainer"], line["seed"]))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def by_trainer(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {name: [r for r in results if r["trainer"] == name] for name in sorted({r["trainer"] for r in results})}


def table(results: Sequence[dict[str, Any]]) -> str:
    """A row for each trainer: right held-out answers before and after, over all seeds, with their 95 % interval."""
    if not results:
        return NOT_RUN
    titles = [f"{name}, {when}" for name in TEMPERATURES for when in ("before", "after")]
    rows = []
    for name, runs in by_trainer(results).items():
        rates = [_rate(runs, when, temperature) for temperature in TEMPERATURES for when in ("before", "after")]
        seconds = sorted(run["seconds_a_step"] for run in runs if run["seconds_a_step"])
        shown = f"{seconds[len(seconds) // 2]:.1f} s" if seconds else "–"
        peak = f"{max(run['peak_gib'] for run in runs):.1f} GiB"
        rows.append([name, f"{len(runs)}, {runs[0]['steps']}", *rates, shown, peak])
    table = markdown(["", "seeds, steps", *titles, "seconds a step", "peak memory"], rows)
    return f"{table}\n{results[0]['machine']['cpu']}, {results[0]['threads']} threads, float32.\n"


def _rate(runs: Sequence[dict[str, Any]], when: str, temperature: str) -> str:
    asked = sum(run["n"] for run in runs)
    rate = sum(run["n"] * run[when][temperature] for run in runs) / asked
    return "{:.2f} [{:.2f}, {:.2f}]".format(rate, *interval(rate, asked))


def draw(svg: Path, file: Path = FILE) -> list[Path]:
    """Each run as a line from its rate before to its rate after, sampled at T = 1; nothing before the first run."""
    results = read(file)
    if not results:
        return []
    trainers, sampled = by_trainer(results), next(iter(TEMPERATURES))

    def paint(axes) -> None:
        for i, runs in enumerate(trainers.values()):
            for run in runs:
                ends = run["before"][sampled], run["after"][sampled]
                axes.plot([i - 0.2, i + 0.2], ends, marker="o", markersize=3, color=plots.WON)
        axes.set_xticks(range(len(trainers)), list(trainers))
        axes.set(ylabel="right held-out answers at T = 1", ylim=(0, 1))

    return [plots.painted(svg, [file], paint, "", (1.3 * len(trainers) + 1.5, 2.8), legend=False)]
