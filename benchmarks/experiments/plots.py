"""The plots of a study as SVG: deterministic, text left as text, so that the files stay small and comparable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy
from matplotlib.figure import Figure

from benchmarks.experiments.measures import MEASURES
from benchmarks.experiments.methods import label_of
from benchmarks.experiments.results import Results
from benchmarks.experiments.statistics import mean
from benchmarks.plots import STYLE, save

COMPARED = {
    "sft": "#c0392b", "sft-same": "#e67e22", "sft-mix": "#b7950b", "dft": "#7d3c98", "grpo": "#1e8449",
    "grpo-4": "#58d68d", "gft": "#1f6f8b", "gft-positive": "#2c3e50", "gft-positive-same": "#85929e",
    "gft-given": "#5dade2",
}  # fmt: skip
BARS = ("sft", "sft-same", "gft", "grpo", "sft>grpo", "sft-same>grpo", "gft>grpo", "grpo>grpo", "sft>gft",
        "sft-same>gft", "sft-same>gft>grpo")  # fmt: skip
GRADIENTS = ("sft", "sft-same", "sft-mix", "dft", "gft-tau-0", "gft", "gft-given", "grpo", "grpo-4")


def draw(results: Results, experts: Sequence[str], page: Path) -> list[tuple[str, str]]:
    """Title and path, relative to the page, of every plot that has something to show; a panel for each expert."""
    folder, made = page.with_suffix(""), []
    for stem, (title, panel) in PLOTS.items():
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(4.6 * len(experts), 3.4), layout="constrained")
            for axes, expert in zip(figure.subplots(1, len(experts), squeeze=False).flat, experts, strict=True):
                axes.set_title(f"{results.study.name}, expert {expert}")
                panel(axes, results, expert)
                if axes.get_legend_handles_labels()[0]:
                    axes.legend(fontsize=6)
            if not any(axes.has_data() for axes in figure.axes):
                continue
            name = f"{results.study.name}-{stem}.svg"
            save(figure, folder / name, [results.file])
        made.append((title, f"{folder.name}/{name}"))
    return made


def _arms(results: Results, expert: str, chains: Sequence[str]):
    for chain in chains:
        records = results.of(chain, expert)
        if records:
            yield chain, label_of(chain), records


def curves(axes, results: Results, expert: str) -> None:
    for chain, label, records in _arms(results, expert, tuple(COMPARED)):
        steps = records[0]["training"]["held_out"]["step"]
        if not steps:
            continue
        rewards = numpy.array([record["training"]["held_out"]["eval_reward"] for record in records])
        middle = rewards.mean(0)
        spread = rewards.std(0, ddof=1) / len(records) ** 0.5 if len(records) > 1 else 0.0 * middle
        axes.plot(steps, middle, label=label, color=COMPARED[chain])
        axes.fill_between(steps, middle - spread, middle + spread, color=COMPARED[chain], alpha=0.15, linewidth=0)
    axes.set(xlabel="optimizer step", ylabel="held-out reward, one sample a prompt", ylim=(0, 1))


def entropy(axes, results: Results, expert: str) -> None:
    for chain, label, records in _arms(results, expert, tuple(COMPARED)):
        points = [[MEASURES[name].of(record) for record in records] for name in ("entropy", "pass1")]
        axes.scatter(*points, label=label, color=COMPARED[chain], s=14)
    axes.set(xlabel="entropy of the policy's own samples (nats per token)", ylabel="pass@1", ylim=(0, 1))


def pass_at_k(axes, results: Results, expert: str) -> None:
    for chain, label, records in _arms(results, expert, tuple(COMPARED)):
        ks = [int(k) for k in records[0]["metrics"]["pass_at"]]
        if max(ks) < 4:
            continue
        found = [mean([record["metrics"]["pass_at"][str(k)] for record in records]).value for k in ks]
        axes.plot(ks, found, label=label, color=COMPARED[chain], marker="o", markersize=3)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="k", ylabel="pass@k", ylim=(0, 1.02))


def gradients(axes, results: Results, expert: str) -> None:
    for chain, label, records in _arms(results, expert, GRADIENTS):
        quantiles = numpy.array([record["training"]["grad_norm"] for record in records]).clip(1e-3)
        middle = numpy.exp(numpy.log(quantiles).mean(0))
        shares = numpy.linspace(0, 1, len(middle))
        axes.plot(middle, shares, label=label, color=COMPARED.get(chain, "#7f8c8d"), marker="o", markersize=2)
    axes.set_xscale("log")
    axes.set(xlabel="gradient norm before clipping", ylabel="share of steps with a smaller one")


def synergy(axes, results: Results, expert: str) -> None:
    arms = list(_arms(results, expert, BARS))
    if not any(">" in chain for chain, _, _ in arms):
        return
    found = [mean([MEASURES["pass1"].of(record) for record in records]) for _, _, records in arms]
    colours = ["#1f6f8b" if "gft" in chain else "#1e8449" if "sft" not in chain else "#c0392b" for chain, _, _ in arms]
    places = range(len(arms))
    axes.barh(places, [m.value for m in found], xerr=[m.error if m.n > 1 else 0 for m in found], color=colours)
    axes.set_yticks(list(places), [label for _, label, _ in arms], fontsize=6)
    axes.invert_yaxis()
    axes.set(xlabel="pass@1, mean and standard error", xlim=(0, 1))


PLOTS: dict[str, tuple[str, Callable]] = {
    "curves": ("Training curves", curves),
    "entropy": ("Entropy against accuracy", entropy),
    "pass-at-k": ("pass@k", pass_at_k),
    "gradients": ("Gradient norms", gradients),
    "synergy": ("Pipelines", synergy),
}
