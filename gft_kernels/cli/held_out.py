"""What a demo found, as one screen and one plot: right held-out answers before and after, with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gft_kernels.trainer.logs import shorten

TEMPERATURES = {"sampled at T = 1": "eval_reward", "greedy": "eval_reward_greedy"}
WIDTH = 110


def interval(rate: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate of successes among n."""
    middle, spread = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)


def columns_of(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {"before": result["before"], **{name.upper(): found for name, found in result["methods"].items()}}


def screen(result: dict[str, Any]) -> str:
    """What a newcomer reads: rates with their intervals, completions side by side, and what may be claimed of them."""
    columns, n = columns_of(result), result["n"]
    lines = [
        f"{result['model']}, {result['parameters'] / 1e6:.1f} M parameters, learns to write {result['about']}.",
        f"Right answers among {n} held-out rows, whose values were never trained on, after {result['steps']} steps",
        "(in brackets the 95 % interval):",
        "",
        row("", columns),
    ]
    for name in TEMPERATURES:
        rates = [found["right"][name] for found in columns.values()]
        lines.append(row(name, ["{:.2f} [{:.2f}, {:.2f}]".format(rate, *interval(rate, n)) for rate in rates]))
    seconds = [f"{f['seconds_a_step']:.1f}" if "seconds_a_step" in f else "" for f in columns.values()]
    lines += [row("seconds a step", seconds), ""]
    for i, asked in enumerate(result["asked"]):
        lines.append(shorten(asked, WIDTH))
        lines += [f"  {name:8}{shorten(found['completions'][i], WIDTH - 10)}" for name, found in columns.items()]
    return "\n".join([*lines, "", *CLAIMS, f"peak memory {result['peak_gib']:.1f} GiB"])


def row(name: str, cells: Sequence[str] | dict) -> str:
    return f"{name:18}" + "".join(f"{cell:>20}" for cell in cells)


CLAIMS = (
    "GFT and SFT saw the same demonstrations, one right and one wrong a prompt. SFT imitates both. GFT rewards every",
    "response, its own samples included, and moves away from what is worse than its group. Where all demonstrations",
    "are known to be right, SFT on them alone learns a task this easy in less time; then use that.",
)


def draw(result: dict[str, Any], out: Path) -> Path:
    """Draws the rates of a result as bars with their intervals; returns the path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes, columns = figure.subplots(), columns_of(result)
    for i, name in enumerate(TEMPERATURES):
        rates = [found["right"][name] for found in columns.values()]
        ends = [interval(rate, result["n"]) for rate in rates]
        reach = [[rate - low for rate, (low, _) in zip(rates, ends, strict=True)],
                 [high - rate for rate, (_, high) in zip(rates, ends, strict=True)]]  # fmt: skip
        axes.bar([x + 0.4 * i for x in range(len(rates))], rates, 0.36, yerr=reach, capsize=3, label=name)
    axes.set_xticks([x + 0.2 for x in range(len(columns))], list(columns))
    axes.set(ylabel="right held-out answers", ylim=(0, 1), title=f"{result['model']}, {result['steps']} steps")
    axes.legend(fontsize="small")
    figure.savefig(out, dpi=120)
    return out
