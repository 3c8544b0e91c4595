"""Figures quoted in the documentation: where a page says they come from, and what the result file holds.

`python tests/project/figures.py` rewrites every figure on every page as its source has it now.

A figure in running text is followed by a comment that names its source, a path into benchmarks/results/:

    22.1 ms<!-- figure: row-cpu.json / 64 × 151936 float32 peaked, 1 thread / gft_loss cpu, in place / median_s -->

A table is followed by one comment, with a line for each column of figures; {row} is the first cell of the row:

    <!-- figures: row-cpu.json / 64 × 151936 float32 peaked, 1 thread / {row}
    time: median_s
    extra memory: extra_bytes
    -->

A step of a path is a key, or the label or name of an entry of a list (`results` and `outcomes` go without saying);
"A ÷ B" as a step divides what the two lead to. Instead of a path there may be a product: `figure: 4096·151936·2 bytes`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

UNITS = {
    "ns": ("seconds", 1e-9), "µs": ("seconds", 1e-6), "ms": ("seconds", 1e-3), "s": ("seconds", 1.0),
    "min": ("seconds", 60.0), "bytes": ("bytes", 1.0),
    "KB": ("bytes", 1e3), "MB": ("bytes", 1e6), "GB": ("bytes", 1e9), "TB": ("bytes", 1e12),
    "KiB": ("bytes", 2.0**10), "MiB": ("bytes", 2.0**20), "GiB": ("bytes", 2.0**30),
    "×": ("number", 1.0), "times": ("number", 1.0), "%": ("number", 0.01), "": ("number", 1.0),
}  # fmt: skip
UNIT = "|".join(sorted((re.escape(unit) for unit in UNITS if unit), key=len, reverse=True))
NUMBER = r"(?<![\w.,])[-−]?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?"
SHOWN = re.compile(rf"(?P<number>{NUMBER})[ \u00a0\u202f]?(?P<unit>(?:{UNIT})(?![\w/])(?!\s*\d))?")
MARKER = re.compile(r"<!--\s*figure:\s*(?P<path>.*?)\s*-->", re.S)
TABLE = re.compile(r"(?P<rows>(?:^\|[^\n]*\n)+)\s*<!--\s*figures:[ ]*(?P<spec>.*?)-->", re.M | re.S)
PERFORMANCE = re.compile(r"\b(performance|speed|benchmarks?|measure[ds]?|measurements?|timings?|memory)\b", re.I)
NOTHING = ("", "–", "-")


@dataclass(frozen=True)
class Figure:
    """A number on a page and the path it is said to come from."""

    line: int
    number: str
    unit: str
    path: str
    start: int  # of the number on the page


def quoted(page: str) -> Iterator[Figure]:
    """Every figure that names its source. Raises ValueError for a marker that nothing stands before."""
    for marker in MARKER.finditer(page):
        before = page[: marker.start()].rstrip(" *\n")
        shown = next((m for m in SHOWN.finditer(before, max(0, len(before) - 40)) if m.end() == len(before)), None)
        if shown is None:
            raise ValueError(f"line {_line(page, marker.start())}: a figure marker must follow a number and its unit")
        path = " ".join(marker["path"].split())
        start = shown.start("number")
        yield Figure(_line(page, marker.start()), shown["number"], shown["unit"] or "", path, start)
    for table in TABLE.finditer(page):
        yield from _in_table(table, _line(page, table.start()))


def _in_table(table: re.Match, line: int) -> Iterator[Figure]:
    common, *lines = table["spec"].strip().splitlines()
    columns = dict(map(str.strip, entry.split(":", 1)) for entry in lines)
    rows = table["rows"].splitlines(keepends=True)
    header = [cell for cell, _ in _cells(rows[0])]
    names = [re.sub(r"\s*\(.*\)$", "", name) for name in header]
    for column in columns:
        if column not in names:
            raise ValueError(f"line {line}: the table has no column {column!r}, only {', '.join(names)}")
    for offset, row in enumerate(rows[2:], start=2):
        begins = table.start() + sum(map(len, rows[:offset]))
        cells = _cells(row)
        for name, title, (cell, place) in zip(names, header, cells, strict=True):
            if name not in columns or cell in NOTHING:
                continue
            bare = cell.strip("*")
            shown = SHOWN.fullmatch(bare)
            if shown is None:
                raise ValueError(f"line {line + offset}: {cell!r} in column {name!r} is not a figure")
            unit = shown["unit"] or next(iter(re.findall(rf"\(({UNIT})\)$", title)), "")
            path = f"{common.strip()} / {columns[name]}".replace("{row}", re.sub(r"[`*]", "", cells[0][0]))
            yield Figure(line + offset, shown["number"], unit, path, begins + place + cell.index(bare))


def _cells(row: str) -> list[tuple[str, int]]:
    """Each cell's text, and where in the row it begins."""
    return [(m[1], m.start(1)) for m in re.finditer(r"\|[ ]*([^|\n]*?)[ ]*(?=\|)", row)]


def unmarked(page: str) -> list[str]:
    """Numbers with a unit in a section on performance that name no source.

    Such a section has a heading with one of the words of `PERFORMANCE`. Code and comments do not count, nor does ×
    between two numbers, which is a shape.
    """
    text = re.sub(r"^```.*?^```|`[^`\n]*`|<!--.*?-->", _blank, page, flags=re.M | re.S)
    known = {(figure.line, figure.number) for figure in quoted(page)}
    found = []
    for start, stop in _performance_sections(text):
        for shown in SHOWN.finditer(text, start, stop):
            line = _line(page, shown.start())
            if shown["unit"] and (line, shown["number"]) not in known and not _marked(page, shown.end()):
                found.append(f"line {line}: {shown[0]}")
    return found


def _blank(match: re.Match) -> str:
    """As long and as many lines as what it stands for, so that offsets stay what they are."""
    return re.sub(r"[^\n]", "\0", match[0])


def _marked(page: str, end: int) -> bool:
    return MARKER.match(page[end:].lstrip(" *\n")) is not None


def _performance_sections(text: str) -> Iterator[tuple[int, int]]:
    headings = [(m.start(), len(m[1]), m[2]) for m in re.finditer(r"^(#+) (.*)$", text, re.M)]
    for start, level, title in headings:
        if PERFORMANCE.search(title):
            stop = next((other for other, depth, _ in headings if other > start and depth <= level), len(text))
            yield start + level + len(title), stop


def disagreement(figure: Figure, results: Path) -> str | None:
    """How a figure differs from its source, both rounded to the digits shown; None if it does not."""
    value, expected = _in_its_unit(figure, results)
    if expected is not None:
        return f"line {figure.line}: {figure.number} {figure.unit} is shown in {expected}"
    if abs(float(_plain(figure.number)) - value) <= 0.5 * _last_place(figure.number) * (1 + 1e-9):
        return None
    return f"line {figure.line}: {figure.number} {figure.unit} is shown, {figure.path} says {value:.6g}"


def _in_its_unit(figure: Figure, results: Path) -> tuple[float, str | None]:
    """The source's value in the unit shown; and, where that unit is of another kind, a word on both kinds."""
    value, kind = _value(figure.path, results)
    expected, scale = UNITS[figure.unit]
    return value / scale, None if kind == expected else f"{expected}, {figure.path} is in {kind}"


def _plain(number: str) -> str:
    return number.replace(",", "").replace("−", "-")


def _last_place(number: str) -> float:
    mantissa, _, exponent = _plain(number).partition("e")
    return 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


def rewritten(page: str, results: Path) -> str:
    """The page with every figure as its source has it now, to as many decimals as were shown."""
    for figure in sorted(quoted(page), key=lambda f: -f.start):
        value, wrong_kind = _in_its_unit(figure, results)
        if wrong_kind is not None or disagreement(figure, results) is None:
            continue
        decimals = len(figure.number.partition(".")[2])
        if "e" in figure.number:
            raise ValueError(f"line {figure.line}: {figure.number} has an exponent; write the new figure by hand")
        shown = f"{value:,.{decimals}f}" if "," in figure.number else f"{value:.{decimals}f}"
        page = page[: figure.start] + shown.replace("-", "−") + page[figure.start + len(figure.number) :]
    return page


def _value(path: str, results: Path) -> tuple[float, str]:
    """What a path leads to, and its kind: seconds, bytes or a plain number."""
    product = re.fullmatch(r"([\d.·]+) bytes", path)
    if product:
        return math.prod(map(float, product[1].split("·"))), "bytes"
    file, *steps = path.split(" / ")
    if not (results / file).exists():
        raise ValueError(f"{path}: benchmarks/results/ has no {file}")
    return _follow(json.loads((results / file).read_text()), steps, path)


def _follow(node, steps: list[str], path: str) -> tuple[float, str]:
    kind = "number"
    for index, step in enumerate(steps):
        if " ÷ " in step:
            both = [_follow(node, [half, *steps[index + 1 :]], path) for half in step.split(" ÷ ")]
            return both[0][0] / both[1][0], "number" if both[0][1] == both[1][1] else "nothing sensible"
        node = _child(node, step, path)
        kind = {"s": "seconds", "bytes": "bytes"}.get(step.rpartition("_")[2] if "_" in step else "", "number")
    if isinstance(node, bool) or not isinstance(node, (int, float)):
        raise ValueError(f"{path}: leads to {str(node)[:60]!r}, not to a number")
    return float(node), kind


def _child(node, step: str, path: str):
    if isinstance(node, dict):
        if step in node:
            return node[step]
        node = node.get("results", node.get("outcomes"))
    if isinstance(node, list):
        named = [e for e in node if isinstance(e, dict) and step in (e.get("label"), e.get("name"))]
        if len(named) == 1:
            return named[0]
    raise ValueError(f"{path}: nothing, or more than one thing, is called {step!r}")


def _line(page: str, offset: int) -> int:
    return page.count("\n", 0, offset) + 1


def main() -> None:
    """Bring every page's figures up to date, and say which pages changed."""
    root = Path(__file__).parents[2]
    for path in (root / "README.md", *sorted(root.glob("docs/**/*.md"))):
        before = path.read_text()
        after = rewritten(before, root / "benchmarks" / "results")
        if after != before:
            path.write_text(after)
            print(path.relative_to(root))


if __name__ == "__main__":
    main()
