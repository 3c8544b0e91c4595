"""Four curves of a run: reward by source, entropy, rectified fraction, gradient norm."""

from __future__ import annotations

from pathlib import Path

from gft_kernels.trainer.callbacks import read_metrics

PANELS = (
    ("reward", {"expert": "reward/expert", "teacher": "reward/teacher", "sampled": "reward/sampled",
                "offline": "reward/offline", "held out": "eval_reward"}),
    ("entropy (nats)", {"entropy": "entropy"}),
    ("rectified fraction", {"rectified": "rectified"}),
    ("gradient norm", {"gradient norm": "grad_norm"}),
)  # fmt: skip


def draw(run: str | Path, out: str | Path | None = None) -> Path:
    """Draws the log of a run into a PNG and returns its path (default: curves.png in the run).

    Raises: FileNotFoundError without metrics.jsonl; ValueError if it holds no training steps yet.
    """
    lines = read_metrics(run)
    if not any("loss" in line for line in lines):
        raise ValueError(f"run must have logged a training step, got none in {str(run)!r}; lower logging_steps.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, curves) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        axes.set_title(title)
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
        for label, name in curves.items():
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                axes.plot(
                    *zip(*points, strict=True), label=label, marker="o" if len(points) < 30 else None, markersize=3
                )
        if len(axes.lines) > 1:
            axes.legend(fontsize="small")
    out = Path(out) if out is not None else Path(run, "curves.png")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    return out
