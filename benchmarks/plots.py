"""The plots of the result files, as small SVGs in docs/figures; `python -m benchmarks.pages` draws them all.

Time over the floor against the vocabulary; peak memory against rows; speed-up against the share of responses that
count; the roofline; and the bars of the front page. A shape where anyone else was faster than our best entry is marked
in red. Every SVG carries the digests of the files it was drawn from, so that a test finds stale ones.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import report
from benchmarks.report import best_of_ours, is_ours, timed, winner_over_us

POINTS = 3
"""A curve of fewer is not worth a plot."""
LOST, WON, OTHER = "#c0392b", "#1f6f8b", "#95a5a6"
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "gft", "font.size": 8, "axes.grid": True, "grid.alpha": 0.3}
"""Text as text: small files that can be searched; the salt makes the same data the same file."""


def save(figure, path: Path, sources: list[Path]) -> Path:
    """Writes a figure as SVG without what readers do not see, and with the digests of its sources."""
    written = io.StringIO()
    for axes in figure.axes:
        axes.minorticks_off()
    figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    drawn_from = ", ".join(f"{source.name} {digest(source)}" for source in sources)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{_compact(written.getvalue())}\n<!-- from {drawn_from} -->\n")
    return path


def _compact(svg: str) -> str:
    """Tenths of a point, no comments or metadata, a line for each group."""
    svg = re.sub(r"<\?xml.*?\?>|<!DOCTYPE.*?>|<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<[^>]+>", lambda tag: re.sub(r"-?\d+\.\d{2,}(?:e-?\d+)?", _tenths, tag[0]), svg)  # not in texts
    svg = re.sub(r"font-family: [^;\"]*", "font-family: sans-serif", svg)
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    svg = re.sub(r'<g id="(?!legend|axes|figure)[^"]*"', "<g", svg)  # nothing refers to a group
    svg = re.sub(r"\s+", " ", re.sub(r">\s+<", "><", svg.strip()))
    while svg != (inner := re.sub(r"<g>(<(?:use|path|text)[^<]*/>|<text[^<]*<(?!g)[^<]*</text>|)</g>", r"\1", svg)):
        svg = inner
    return re.sub(r'<g id="', '\n<g id="', svg)


def _tenths(number: re.Match) -> str:
    return f"{float(number[0]):.1f}".removesuffix(".0")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def sources(figure: Path) -> dict[str, str]:
    """The result files an SVG was drawn from, and their digests then."""
    found = re.search(r"<!-- from (.*?) -->", figure.read_text())
    return dict(entry.split(" ") for entry in found[1].split(", ")) if found else {}


def painted(path: Path, drawn_from: list[Path], paint: Callable, title: str, size=(7, 4.2), legend=True) -> Path:
    """The file of a figure with one pair of axes, which `paint` is handed."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        paint(axes)
        axes.set_title(title, fontsize=9)
        if legend:
            axes.legend(fontsize=7)
        return save(figure, path, drawn_from)


def draw(paths: list[Path], folder: Path) -> list[Path]:
    """Every plot the result files have the cases for."""
    written = []
    for path in paths:
        saved = report.load(path)
        for dtype in dict.fromkeys(r["case"].get("dtype") for r in saved["results"]):
            for curve in CURVES:
                points = curve.points(saved, dtype)
                usable = [r for r in points if any(curve.y(r, o) is not None for o in timed(r))]
                if len({curve.x(r["case"]) for r in usable}) >= POINTS:
                    name = folder / f"{path.stem}-{curve.stem}-{dtype}.svg"
                    title = f"{dtype}, {saved['machine'].get('gpu') or saved['machine']['cpu']}, from {path.name}"
                    written.append(painted(name, [path], lambda axes, c=curve, u=usable: _curves(axes, c, u), title))
    if pair := _roofline_cases(paths):
        row, linear, drawn_from = pair
        title = f"Roofline, from {' and '.join(path.name for path in drawn_from)}"
        written.append(painted(folder / "roofline.svg", drawn_from, lambda axes: _roofline(axes, row, linear), title))
    return written


# Curves: a figure of each contender over something that varies from case to case.


@dataclass(frozen=True)
class Curve:
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
    first = chosen[0]["case"] if chosen else {}
    swept = {"vocab": ("rows", "vocab"), "rows": ("rows",), "live": ("dead", "dead_share")}[over]
    alike = [r for r in chosen if all(r["case"][key] == first[key] for key in first if key not in swept)]
    if over == "vocab":
        alike = [r for r in alike if 0.9 < _flop(r) / _flop(chosen[0]) < 1.1]
    if over == "live":
        alike = [r for r in alike if r["case"]["dead"] != "masked"]
    return sorted(alike, key=lambda r: live(r["case"]) if over == "live" else r["case"][over])


def live(case: dict) -> float:
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
    Curve("live", live, _over_eager, "share of responses with A ≠ 0", "times as fast as eager PyTorch, lean",
          lambda saved, dtype: sweep(saved, dtype, "live", "linear"), ("linear", "log")),
)  # fmt: skip


def _curves(axes, curve: Curve, points: list[dict]) -> None:
    ours = best_of_ours(points[-1])
    names = dict.fromkeys(o["name"] for r in points for o in timed(r) if curve.y(r, o) is not None)
    for name in names:
        series = [(r, o) for r in points for o in timed(r) if o["name"] == name and curve.y(r, o) is not None]
        axes.plot([curve.x(r["case"]) for r, _ in series], [curve.y(r, o) for r, o in series], marker="o", markersize=3,
                  linewidth=2 if is_ours({"name": name}) else 1, label=name,
                  color=WON if ours and name == ours["name"] else None)  # fmt: skip
    if curve.marks_lost:
        lost = [(r, best_of_ours(r)) for r in points if winner_over_us(r)]
        at = [(curve.x(r["case"]), curve.y(r, o)) for r, o in lost if curve.y(r, o) is not None]
        axes.scatter([x for x, _ in at], [y for _, y in at], color=LOST, s=60, zorder=3,
                     label="someone else is faster" if at else None)  # fmt: skip
    axes.set(xscale=curve.scales[0], yscale=curve.scales[1], xlabel=curve.x_label, ylabel=curve.y_label)


# The roofline: useful operations a second against operations a byte, under ceilings that were measured, not claimed.
# The slope is what the row benchmark's floor moves (a read and a write of the logits), the plateau what the linear
# benchmark's floor computes. Contenders whose passes are not known are left out.

ROW_FLOP = 22
"""Operations a logit: two exponentials (degree 5: a reduction, five multiply-adds, a scaling are about 9), two sums."""


def _roofline_cases(paths: list[Path]) -> tuple[dict, dict, list[Path]] | None:
    """A CPU's largest plain float32 row and linear case under as many threads (of equals the fullest)."""
    found = [(r, path) for path in paths for r in report.load(path)["results"] if _is_plain(r)]
    linear, linear_path = max((f for f in found if f[0]["benchmark"] == "linear"), key=_size, default=(None, None))
    threads = linear["case"]["threads"] if linear else None
    rows = [f for f in found if f[0]["benchmark"] == "row" and f[0]["case"]["threads"] == threads]
    row, row_path = max(rows, key=_size, default=(None, None))
    return (row, linear, sorted({row_path, linear_path})) if row and linear else None


def _is_plain(result: dict) -> bool:
    case = result["case"]
    if result["benchmark"] not in ("row", "linear") or case["device"] != "cpu":
        return False
    return (case["dtype"], case["dead"], case.get("logits", "peaked")) == ("float32", "none", "peaked")


def _size(found: tuple[dict, Path]) -> tuple[float, int]:
    return _flop(found[0]), len(timed(found[0]))


def _flop(result: dict) -> float:
    case = result["case"]
    each = ROW_FLOP if result["benchmark"] == "row" else 6 * case["hidden"]  # linear: three products of 2·N·D·V
    return each * case["rows"] * case["vocab"]


def _bytes(result: dict, outcome: dict) -> float | None:
    """Linear: both inputs read, both gradients written, no logits; row: the passes of the traffic model."""
    if result["benchmark"] == "linear":
        return 2 * result["input_bytes"]
    return None if outcome["reads"] is None else (outcome["reads"] + outcome["writes"]) * result["input_bytes"]


def _roofline(axes, row: dict, linear: dict) -> None:
    floors = [next(o for o in timed(result) if o["objective"] is None) for result in (row, linear)]
    bytes_s = 2 * row["input_bytes"] / floors[0]["median_s"]
    peak_flop_s = _flop(linear) / floors[1]["median_s"]
    ridge = peak_flop_s / bytes_s
    reach = [0.3, ridge, 300 * ridge]
    axes.plot(reach, [min(x * bytes_s, peak_flop_s) / 1e9 for x in reach], color="black", linewidth=1,
              label=f"measured ceilings: {bytes_s / 1e9:.1f} GB/s, {peak_flop_s / 1e9:.0f} GFLOP/s")  # fmt: skip
    for result in (row, linear):
        for outcome in timed(result):
            moved = _bytes(result, outcome)
            if outcome["objective"] is not None and moved is not None:
                at = [_flop(result) / moved], [_flop(result) / outcome["median_s"] / 1e9]
                look = {"s": 40, "marker": "*"} if is_ours(outcome) else {"s": 20}
                axes.scatter(*at, label=outcome["name"], **look)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte (traffic model)", ylabel="useful GFLOP/s")


# The front page.


def bars(path: Path, label: str, svg: Path, floor: str, scale: str, ticks: tuple[float, ...]) -> Path:
    """Everyone's time over the floor in one case, of those who computed the same, fastest first."""
    result = next(r for r in report.load(path)["results"] if r["label"] == label)
    shown = sorted((o for o in timed(result) if o["objective"] in (None, "gft")), key=lambda o: o["median_s"])

    def paint(axes) -> None:
        colours = [WON if is_ours(o) else OTHER for o in shown]
        drawn = axes.barh([o["name"] for o in shown], [o["over_floor"] for o in shown], color=colours, height=0.7)
        axes.bar_label(drawn, [f"{o['over_floor']:.{1 if o['over_floor'] > 2 else 2}f}" for o in shown], padding=3)
        axes.margins(x=0.1)  # room for the labels
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xscale=scale, xlabel=f"time over the floor: {floor}")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])

    return painted(svg, [path], paint, f"Loss and gradient, {label}", (7, 2.6), legend=False)
