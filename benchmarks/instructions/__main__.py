"""`python -m benchmarks.instructions [--accept]`: count, and compare with the record or write it (counts.txt).

Callgrind knows no AVX-512, so the portable and the AVX2 kernels are counted; the others share their text
(csrc/cpu/row_kernel.h). Counts depend on the compiler: differences under another one than the record's are shown alone.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).with_name("counts.txt")
SETS, DTYPES = ("portable", "avx2"), ("float32", "bfloat16", "float16")
PASSES = ("statistics", "gradient", "tilted", "scale")  # tilted: the gradient with an entropy bonus
VOCAB = 20011  # odd, so that tails are walked; long enough that a call's own cost is below the tolerance
TOLERANCE = 0.02
HEAD = "# Instructions an element of the row kernels; python -m benchmarks.instructions --accept writes this file."


def absent() -> str | None:
    """Why this machine cannot count, as a sentence; None if it can."""
    for tool in ("valgrind", "c++"):
        if shutil.which(tool) is None:
            return f"{tool} is not on the PATH"
    return None


def compiler() -> str:
    return subprocess.run(["c++", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def build(folder: Path) -> Path:
    """The driver, by the project's own CMake file and flags."""
    import pybind11

    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{Path('/usr/bin')}") or "cmake"
    options = [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}", "-DGFT_TESTS=ON"]
    for command in (
        [cmake, "-S", ROOT, "-B", folder, *options],
        [cmake, "--build", folder, "--target", "gft_instructions"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"building the driver must succeed, got:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return folder / "gft_instructions"


def count(driver: Path, instruction_set: str, dtype: str, walk: str) -> int | None:
    """Instructions of one pass over VOCAB logits; None where the emulated processor lacks the set."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--toggle-collect=gft_counted_pass", "--collect-atstart=no", f"--callgrind-out-file={folder}/out"]
        command = ["valgrind", "--tool=callgrind", *options, driver, instruction_set, dtype, walk, str(VOCAB)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 2:
        return None
    found = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or not found:
        raise RuntimeError(f"callgrind must count {instruction_set} {dtype} {walk}, got:\n{done.stderr[-2000:]}")
    return int(found[1])


def measure(driver: Path) -> Iterator[tuple[str, float]]:
    """Every pass's name and its instructions an element."""
    for instruction_set, dtype, walk in product(SETS, DTYPES, PASSES):
        counted = count(driver, instruction_set, dtype, walk)
        if counted is not None:
            yield f"{instruction_set} {dtype} {walk}", counted / VOCAB


def read(path: Path = RECORD) -> tuple[str, dict[str, float]]:
    """The record's compiler, and its counts by pass."""
    entries = dict(line.split(": ", 1) for line in path.read_text().splitlines() if line and not line.startswith("#"))
    return entries.pop("compiler"), {name: float(number) for name, number in entries.items()}


def write(counts: dict[str, float], made_by: str, path: Path = RECORD) -> None:
    path.write_text("\n".join([HEAD, f"compiler: {made_by}", *(f"{n}: {c:.3f}" for n, c in counts.items())]) + "\n")


def changes(recorded: dict[str, float], counts: dict[str, float]) -> list[str]:
    """A line for each pass whose count moved by more than the tolerance, in either direction, or came or went."""
    lines = [f"{name}: recorded, but not counted here" for name in recorded if name not in counts]
    for name, now in counts.items():
        before = recorded.get(name)
        if before is None:
            lines.append(f"{name}: {now:.3f} instructions an element, not in the record")
        elif abs(now / before - 1) > TOLERANCE:
            lines.append(f"{name}: {before:.3f} → {now:.3f} instructions an element ({now / before - 1:+.1%})")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--accept", action="store_true", help="write the record")
    accept = parser.parse_args(argv).accept
    if (reason := absent()) is not None:
        print(f"instruction counts skipped: {reason}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        counts = dict(measure(build(Path(folder))))
    for name, number in counts.items():
        print(f"{name:<28}{number:8.3f} instructions an element")
    if accept:
        write(counts, compiler())
        return 0
    made_by, recorded = read()
    return judge(changes(recorded, counts), made_by == compiler(), made_by)


def judge(lines: list[str], counts: bool, made_by: str) -> int:
    """Print what changed; 1 if it does count."""
    print(*lines, sep="\n", end="\n" if lines else "")
    if lines and not counts:
        print(f"the record was made by {made_by}, so differences do not count")
    elif lines:
        print("the kernels' cost has changed; if that is meant, python -m benchmarks.instructions --accept, and commit")
    else:
        print(f"instruction counts are within {TOLERANCE:.0%} of the record")
    return 1 if lines and counts else 0


if __name__ == "__main__":
    sys.exit(main())
