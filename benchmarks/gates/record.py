"""The committed record of what the compilers made of every kernel, and how a build differs from it.

`compiled.txt` has a section for each gate: the compiler and one line for each variant. A change of any figure is a line
in a diff; it is accepted by writing the record again (`python -m benchmarks.gates --accept`) and committing it.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gates.measures import COLUMNS, Verdict

RECORD = Path(__file__).with_name("compiled.txt")
HEAD = "# What compilers made of the GPU kernels; python -m benchmarks.gates --accept writes this file."


def line(verdict: Verdict) -> str:
    figures = ", ".join(f"{name.replace('_', ' ')} {getattr(verdict.measures, name)}" for name in COLUMNS)
    return f"{verdict.variant}: {figures}"


def read(path: Path = RECORD) -> dict[str, list[str]]:
    """By gate: first the compiler, then the variants' lines."""
    sections: dict[str, list[str]] = {}
    if path.exists():
        for text in path.read_text().splitlines():
            if text.startswith("["):
                sections[text.strip("[]")] = []
            elif text and not text.startswith("#"):
                sections[list(sections)[-1]].append(text)
    return sections


def accept(name: str, compiler: str, verdicts: Sequence[Verdict], path: Path = RECORD) -> None:
    """Write one gate's section anew; the others stay, for not every machine has every compiler."""
    sections = read(path) | {name: [f"compiler: {compiler}", *map(line, verdicts)]}
    parts = ["\n".join([f"[{gate}]", *lines]) for gate, lines in sorted(sections.items())]
    path.write_text("\n\n".join([HEAD, *parts]) + "\n")


def differences(name: str, compiler: str, verdicts: Sequence[Verdict], path: Path = RECORD) -> tuple[str, bool]:
    """A diff of one gate's section against this build's, "" if they agree; and whether it counts.

    It does not where the compiler is another one than the record's: its figures are its own. Only targets that were
    compiled are compared.
    """
    recorded = read(path).get(name, ["compiler: none"])
    targets = {verdict.variant.split()[0] for verdict in verdicts}
    kept = [text for text in recorded[1:] if text.split()[0] in targets]
    diff = "\n".join(difflib.unified_diff(kept, list(map(line, verdicts)), path.name, "this build", lineterm="", n=0))
    return diff, recorded[0] == f"compiler: {compiler}"
