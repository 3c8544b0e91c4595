"""Plots of result files: `python -m benchmarks.plots FILE.json ... [--out FOLDER]`: each draws what its cases allow.

Time over the floor against the vocabulary; peak memory against rows; speed-up against the share of responses that
count; and, if there are a row and a linear file, the roofline. A shape where anyone else was faster than our best entry
is marked in red. Every SVG carries the digests of the files it was drawn from, so that a test finds stale ones.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import report, roofline
from benchmarks.verdicts import OURS, best_of_ours, timed, winner_over_us

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
POINTS = 3
"""A curve of fewer is not worth a plot."""
LOST, WON = "#c0392b", "#1f6f8b"


@dataclass(frozen=True)
class Curve:
    """What a plot shows: a figure of each contender over something that varies from case to case."""

    stem: str
    x: Callable[[dict], float]  # of a case
    y: Callable[[dict, dict], float | None]  # of a result and one of its outcomes
    x_label: str
    y_label: str
    points: Callable[[dict, str], list[dict]]  # of a report and a dtype
    scales: tuple[str, str] = ("log", "log")
    marks_lost: bool = True


def sweep(saved: dict, dtype: str, over: str, kind: str = "row") -> list[dict]:
    """The cases of one dtype that differ from the first of that dtype in what is swept alone, ordered by it.

    over "vocab": the number of logits stays about the first case's. "rows": the vocabulary is the first's.
    "live": how large a part of the responses has no advantage.
    """
    chosen = [r for r in saved["results"] if r["case"].get("dtype") == dtype and r["benchmark"] == kind]
    if not chosen:
        return []
    swept = {"vocab": ("rows", "vocab"), "rows": ("rows",), "live": ("dead", "dead_share")}[over]
    first = chosen[0]["case"]
    logits = first["rows"] * first["vocab"]
    alike = [r for r in chosen if all(r["case"][key] == first[key] for key in first if key not in swept)]
    if over == "vocab":
        alike = [r for r in alike if 0.9 < r["case"]["rows"] * r["case"]["vocab"] / logits < 1.1]
    if over == "live":
        alike = [r for r in alike if r["case"]["dead"] != "masked"]
    return sorted(alike, key=lambda r: _live(r["case"]) if over == "live" else r["case"][over])


def _live(case: dict) -> float:
    return 1.0 if case["dead"] == "none" else 1.0 - case["dead_share"]


def _over_eager(result: dict, outcome: dict) -> float | None:
    eager = next((o for o in timed(result) if o["name"] == "eager PyTorch, lean"), None)
    return eager["median_s"] / outcome["median_s"] if eager and outcome["objective"] is not None else None


def _mebibytes(result: dict, outcome: dict) -> float | None:
    return None if outcome["extra_bytes"] is None else outcome["extra_bytes"] / 2**20


CURVES = (
    Curve("time", lambda case: case["vocab"], lambda result, outcome: outcome["over_floor"], "vocabulary",
          "time / time of reading and writing the logits once", lambda saved, dtype: sweep(saved, dtype, "vocab")),
    Curve("memory", lambda case: case["rows"], _mebibytes, "rows", "peak memory beyond the inputs, MiB",
          lambda saved, dtype: sweep(saved, dtype, "rows"), ("log", "symlog"), marks_lost=False),
    Curve("live", _live, _over_eager, "share of responses with A ≠ 0", "times as fast as eager PyTorch, lean",
          lambda saved, dtype: sweep(saved, dtype, "live", "linear"), ("linear", "log")),
)  # fmt: skip


def draw(paths: list[Path], folder: Path) -> list[Path]:
    """Every plot the result files have the cases for."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for path in paths:
        saved = report.load(path)
        for dtype in dict.fromkeys(r["case"].get("dtype") for r in saved["results"]):
            for curve in CURVES:
                points = curve.points(saved, dtype)
                usable = [r for r in points if any(curve.y(r, o) is not None for o in timed(r))]
                if len({curve.x(r["case"]) for r in usable}) >= POINTS:
                    name = folder / f"{path.stem}-{curve.stem}-{dtype}.svg"
                    _save(name, [path], lambda axes, c=curve, p=usable: _curves(axes, c, p), _title(saved, dtype))
                    written.append(name)
    if (pair := roofline.pair_of(paths)) is not None:
        name = folder / "roofline.svg"
        _save(name, pair.paths, lambda axes: roofline.draw(axes, pair), _title(report.load(pair.paths[0]), "float32"))
        written.append(name)
    return written


def _title(saved: dict, dtype: str) -> str:
    return f"{dtype}, {saved['machine'].get('gpu') or saved['machine']['cpu']}"


def _save(name: Path, sources: list[Path], paint: Callable, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # text as text: small files that can be searched; the salt makes the same data the same file
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gft"}):
        figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
        paint(axes)
        axes.set_title(title, fontsize=9)
        axes.legend(fontsize=7)
        drawn_from = ", ".join(f"{path.name} {digest(path)}" for path in sources)
        figure.savefig(name, metadata={"Date": None, "Source": drawn_from})
        pyplot.close(figure)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def sources(figure: Path) -> dict[str, str]:
    """The result files an SVG was drawn from, and their digests then."""
    found = re.search(r"<dc:source>(.*?)</dc:source>", figure.read_text())
    return dict(entry.split(" ") for entry in found[1].split(", ")) if found else {}


def _curves(axes, curve: Curve, points: list[dict]) -> None:
    names = dict.fromkeys(o["name"] for r in points for o in timed(r) if curve.y(r, o) is not None)
    for name in names:
        series = [(r, o) for r in points for o in timed(r) if o["name"] == name and curve.y(r, o) is not None]
        x, y = [curve.x(r["case"]) for r, _ in series], [curve.y(r, o) for r, o in series]
        ours = name.startswith(OURS)
        axes.plot(x, y, marker="o", markersize=3, linewidth=2 if ours else 1, label=name,
                  color=WON if name == _leader(points) else None)  # fmt: skip
    if curve.marks_lost:
        lost = [(r, best_of_ours(r)) for r in points if winner_over_us(r)]
        at = [(curve.x(r["case"]), curve.y(r, o)) for r, o in lost if curve.y(r, o) is not None]
        axes.scatter([x for x, _ in at], [y for _, y in at], color=LOST, s=60, zorder=3,
                     label="someone else is faster" if at else None)  # fmt: skip
    axes.set_xscale(curve.scales[0])
    axes.set_yscale(curve.scales[1])
    axes.set_xlabel(curve.x_label)
    axes.set_ylabel(curve.y_label)


def _leader(points: list[dict]) -> str | None:
    """Our fastest entry at the last point: the one that is drawn in our colour."""
    ours = best_of_ours(points[-1])
    return ours["name"] if ours else None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=FIGURES)
    options = parser.parse_args(argv)
    for path in draw(options.results, options.out):
        print(path)


if __name__ == "__main__":
    main()
