"""What a folder holds, written last: the size and the mark of every file, by which a torn or exchanged one is known.

A file's mark is the hash of its bytes, or for a large file of 16 blocks spread over it: that shows a file that was cut,
emptied or exchanged, at a cost that does not grow with the model.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
BLOCK, BLOCKS = 1 << 20, 16


def write_manifest(folder: Path, **known: Any) -> None:
    """Size and mark of every file in a folder, and what else is to be known of it; the file appears whole."""
    files = {str(path.relative_to(folder)): [path.stat().st_size, mark(path)] for path in files_of(folder)}
    unfinished = folder / f".{MANIFEST}"
    unfinished.write_text(json.dumps({"files": files, **known}, indent=1), encoding="utf-8")
    os.replace(unfinished, folder / MANIFEST)


def read_manifest(folder: Path) -> dict | None:
    """What `write_manifest` wrote, or None where it did not. Raises ValueError if it cannot be read."""
    path = folder / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def files_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (MANIFEST, f".{MANIFEST}"))


def mark(path: Path) -> str:
    size, found = path.stat().st_size, hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        for i in range(BLOCKS):
            if size > BLOCK * BLOCKS:
                file.seek((size - BLOCK) * i // (BLOCKS - 1))
            found.update(file.read(BLOCK))
    return found.hexdigest()


def differs(folder: Path, files: dict[str, list]) -> str | None:
    """The first file that is not as its manifest says, and how; or None."""
    for name, (size, expected) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if mark(path) != expected:
            return f"{name} is not the file that was saved"
    return None
