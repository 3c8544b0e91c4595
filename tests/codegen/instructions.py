"""Instructions an element of the CPU row kernels, counted under callgrind and held to limits.

Callgrind knows no AVX-512, so the portable and the AVX2 kernels are counted; the others share their text
(csrc/cpu/row_kernel.cpp).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parents[2]
SETS, DTYPES = ("portable", "avx2"), ("float32", "bfloat16", "float16")
PASSES = ("statistics", "gradient", "tilted", "scale")  # tilted: the gradient with an entropy bonus
VOCAB = 20011  # odd, so that tails are walked; long enough that a call's own cost is lost in it

# A quarter above what GCC 12 makes of them: room for another compiler's order of instructions, and none for what these
# counts have caught before. A helper that is called instead of inlined costs three times as much, a vector that is
# taken apart into elements five times, one more exponential an element half as much again.
LIMITS = {  # instructions an element, in the order of PASSES
    "portable float32": (12.8, 11.4, 14.0, 1.34),
    "portable bfloat16": (13.0, 24.6, 28.1, 21.3),  # no vector instruction rounds to 16 bits in the portable set
    "portable float16": (31.7, 58.4, 61.6, 53.3),
    "avx2 float32": (3.47, 3.16, 3.86, 0.48),
    "avx2 bfloat16": (3.53, 4.13, 4.52, 1.78),
    "avx2 float16": (3.25, 3.11, 3.86, 0.81),
}


def absent() -> str | None:
    """Why this machine cannot count, as a sentence; None if it can."""
    for tool in ("valgrind", "c++"):
        if shutil.which(tool) is None:
            return f"{tool} is not on the PATH"
    return None


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


def limit_of(name: str) -> float:
    kind, walk = name.rsplit(" ", 1)
    return LIMITS[kind][PASSES.index(walk)]


def broken_by(counts: dict[str, float]) -> list[str]:
    """Each broken limit as a sentence."""
    return [
        f"{name}: instructions an element must be at most {limit_of(name):g}, got {now:.3f}"
        for name, now in counts.items()
        if now > limit_of(name)
    ]


def check() -> bool:
    """Count every pass and print the table and each broken limit; True if all hold, or this machine cannot count."""
    if (reason := absent()) is not None:
        print(f"instruction counts skipped: {reason}")
        return True
    with tempfile.TemporaryDirectory() as folder:
        counts = dict(measure(build(Path(folder))))
    for name, number in counts.items():
        print(f"{name:<28}{number:8.3f} of {limit_of(name):g} instructions an element")
    broken = broken_by(counts)
    print(*broken, sep="\n", end="\n" if broken else "")
    return not broken
