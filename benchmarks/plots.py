"""Plots of a row result file: `python -m benchmarks.plots RESULTS.json [--out FOLDER]`.

Time over the floor against the vocabulary, and peak extra memory against the number of rows. A shape where ours loses
to any contender of the same objective is marked in red: losing shapes are published too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

OURS = "gft_loss"
LOST, WON = "#c0392b", "#1f6f8b"


def timed(result: dict) -> list[dict]:
    return [outcome for outcome in result["outcomes"] if outcome["status"] == "timed"]


def best_of_ours(result: dict) -> dict | None:
    """Our fastest entry in a case."""
    return min((o for o in timed(result) if o["name"].startswith(OURS)), key=lambda o: o["median_s"], default=None)


def loses(result: dict) -> bool:
    """Whether someone else's answer to the same question came faster."""
    ours = best_of_ours(result)
    others = [o for o in timed(result) if o["objective"] == "gft" and not o["name"].startswith(OURS)]
    return ours is not None and any(other["median_s"] < ours["median_s"] for other in others)


def sweep(report: dict, dtype: str, over: str) -> list[dict]:
    """The cases of one dtype that differ from the first of that dtype in rows and vocabulary alone, ordered by `over`.

    For `over="vocab"` the number of logits stays about the first case's; for "rows" the vocabulary is the first's.
    """
    of_dtype = [result for result in report["results"] if result["case"]["dtype"] == dtype]
    if not of_dtype:
        return []
    first = of_dtype[0]["case"]
    chosen = []
    for result in of_dtype:
        case = result["case"]
        if any(case[key] != first[key] for key in case if key not in ("rows", "vocab")):
            continue
        near = 0.9 < case["rows"] * case["vocab"] / (first["rows"] * first["vocab"]) < 1.1
        if near if over == "vocab" else case["vocab"] == first["vocab"]:
            chosen.append(result)
    return sorted(chosen, key=lambda result: result["case"][over])


def draw(report: dict, folder: Path) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for dtype in dict.fromkeys(result["case"]["dtype"] for result in report["results"]):
        for over, value, scale, axis, stem in (
            ("vocab", "over_floor", 1, "time / time of reading and writing the logits once", "time"),
            ("rows", "extra_bytes", 2**20, "peak memory beyond the inputs, MiB", "memory"),
        ):
            points = [r for r in sweep(report, dtype, over) if any(o[value] is not None for o in timed(r))]
            if len(points) < 2:
                continue
            figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
            _lines(axes, points, over, value, scale)
            axes.set_xlabel({"vocab": "vocabulary", "rows": "rows"}[over])
            axes.set_ylabel(axis)
            axes.set_title(f"{dtype}, {report['machine'].get('gpu') or report['machine']['cpu']}", fontsize=9)
            axes.legend(fontsize=7)
            written.append(folder / f"{report['benchmark']}-{stem}-{dtype}.png")
            figure.savefig(written[-1], dpi=150)
            pyplot.close(figure)
    return written


def _lines(axes, points: list[dict], over: str, value: str, scale: float) -> None:
    names = dict.fromkeys(o["name"] for result in points for o in timed(result) if o[value] is not None)
    for name in names:
        series = [(r, o) for r in points for o in timed(r) if o["name"] == name and o[value] is not None]
        x, y = [r["case"][over] for r, _ in series], [o[value] / scale for _, o in series]
        ours = name.startswith(OURS)
        axes.plot(x, y, marker="o", markersize=3, linewidth=2 if ours else 1, label=name,
                  color=WON if name.endswith("in place") else None)  # fmt: skip
        if ours and value == "over_floor":
            lost = [(a, b) for a, b, (r, o) in zip(x, y, series, strict=True) if loses(r) and o == best_of_ours(r)]
            axes.scatter([a for a, _ in lost], [b for _, b in lost], color=LOST, s=60, zorder=3)
    axes.set_xscale("log")
    axes.set_yscale("symlog" if value == "extra_bytes" else "log")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(argv)
    for path in draw(json.loads(options.results.read_text()), options.out):
        print(path)


if __name__ == "__main__":
    main()
