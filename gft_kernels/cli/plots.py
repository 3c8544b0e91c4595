"""The curves of a run: one panel for each kind of metric that it logged, as a picture or as SVG for a page."""

from __future__ import annotations

import io
from pathlib import Path

from gft_kernels.trainer.logs import read_metrics

PANELS = {
    "reward": {"expert": "reward/expert", "teacher": "reward/teacher", "sampled": "reward/sampled",
               "offline": "reward/offline", "held out": "eval_reward", "held out, greedy": "eval_reward_greedy"},
    "entropy (nats)": {"entropy": "entropy"},
    "tokens held back": {"rectified": "rectified", "clipped": "clipped"},
    "gradient norm": {"gradient norm": "grad_norm"},
    "length of sampled responses (tokens)": {"training": "completion_length", "held out": "eval_completion_length"},
    "fractions": {"cut at the length limit": "truncated", "groups without advantage": "zero_std_groups"},
    "KL (nats)": {"to the starting weights": "kl_to_start", "to the policy that sampled": "drift/kl"},
    "tokens a second": {"in all": "tokens_per_second", "sampling": "tokens_per_second/sampling",
                        "training": "tokens_per_second/training"},
}  # fmt: skip
FEW = 30  # points, below which each is marked


def logged(run: str | Path) -> list[dict]:
    """The log lines of a run. Raises: FileNotFoundError without a log; ValueError if it has no training step yet."""
    lines = read_metrics(run)
    if not any("loss" in line for line in lines):
        raise ValueError(f"run must have logged a training step, got none in {str(run)!r}; lower logging_steps.")
    return lines


def panels(lines: list[dict]) -> list[tuple[str, dict[str, list[tuple[int, float]]]]]:
    """(title, points of each curve) of every panel that has any."""
    found = []
    for title, curves in PANELS.items():
        points = {label: [(line["step"], line[name]) for line in lines if name in line]
                  for label, name in curves.items()}  # fmt: skip
        if any(points.values()):
            found.append((title, {label: some for label, some in points.items() if some}))
    return found


def draw(lines: list[dict], out: str | Path) -> Path:
    """Draws the log of a run as one picture. Raises ValueError for a kind of it that matplotlib does not write."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    _figure(panels(lines), columns=2).savefig(out, dpi=120)
    return out


def svgs(lines: list[dict]) -> list[tuple[str, str]]:
    """(title, SVG element) of every panel; the same log gives the same text, which is left as text."""
    import matplotlib

    drawn = []
    for title, curves in panels(lines):
        file = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}):
            _figure([("", curves)], columns=1).savefig(file, format="svg", metadata={"Date": None}, transparent=True)
        drawn.append((title, file.getvalue()[file.getvalue().index("<svg") :]))
    return drawn


def _figure(found, columns: int):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = -(-len(found) // columns)
    width, height = 5 * columns, 3 * rows
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    # in inches, for every panel alike: a layout worked out for each figure would take longer than drawing it
    figure.subplots_adjust(left=0.6 / width, right=1 - 0.1 / width, bottom=0.5 / height, top=1 - 0.3 / height,
                           wspace=0.15, hspace=0.4)  # fmt: skip
    for axes, (title, curves) in zip(figure.subplots(rows, columns, squeeze=False).flat, found, strict=False):
        axes.set(title=title, xlabel="optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        for label, points in curves.items():
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < FEW else None, markersize=3)
        if len(curves) > 1:
            axes.legend(fontsize="small")
    for axes in figure.axes[len(found) :]:
        axes.remove()
    return figure
