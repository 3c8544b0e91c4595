"""Figures quoted in the documentation: where a page says they come from, and what the result file holds.

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


def quoted(page: str) -> Iterator[Figure]:
    """Every figure that names its source. Raises ValueError for a marker that nothing stands before."""
    for marker in MARKER.finditer(page):
        before = page[: marker.start()].rstrip(" *\n")
        shown = next((m for m in SHOWN.finditer(before, max(0, len(before) - 40)) if m.end() == len(before)), None)
        if shown is None:
            raise ValueError(f"line {_line(page, marker.start())}: a figure marker must follow a number and its unit")
        path = " ".join(marker["path"].split())
        yield Figure(_line(page, marker.start()), shown["number"], shown["unit"] or "", path)
    for table in TABLE.finditer(page):
        yield from _in_table(table, _line(page, table.start()))


def _in_table(table: re.Match, line: int) -> Iterator[Figure]:
    common, *lines = table["spec"].strip().splitlines()
    columns = dict(map(str.strip, entry.split(":", 1)) for entry in lines)
    header, _rule, *rows = [_cells(row) for row in table["rows"].splitlines()]
    names = [re.sub(r"\s*\(.*\)$", "", name) for name in header]
    for column in columns:
        if column not in names:
            raise ValueError(f"line {line}: the table has no column {column!r}, only {', '.join(names)}")
    for offset, row in enumerate(rows, start=2):
        for name, title, cell in zip(names, header, row, strict=True):
            if name not in columns or cell in NOTHING:
                continue
            shown = SHOWN.fullmatch(cell.strip("*"))
            if shown is None:
                raise ValueError(f"line {line + offset}: {cell!r} in column {name!r} is not a figure")
            unit = shown["unit"] or next(iter(re.findall(rf"\(({UNIT})\)$", title)), "")
            path = f"{common.strip()} / {columns[name]}".replace("{row}", re.sub(r"[`*]", "", row[0]))
            yield Figure(line + offset, shown["number"], unit, path)


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


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
    value, kind = _value(figure.path, results)
    expected, scale = UNITS[figure.unit]
    if kind != expected:
        return f"line {figure.line}: {figure.number} {figure.unit} is shown in {expected}, {figure.path} is in {kind}"
    number = figure.number.replace(",", "").replace("−", "-")
    mantissa, _, exponent = number.partition("e")
    last_place = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    if abs(float(number) - value / scale) <= 0.5 * last_place * (1 + 1e-9):
        return None
    return f"line {figure.line}: {figure.number} {figure.unit} is shown, {figure.path} says {value / scale:.6g}"


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
