"""Instructions an element of the CPU row kernels, counted and held to limits.

On x86 callgrind counts; it knows no AVX-512, so the portable and the AVX2 kernels are counted, and the AVX-512 ones
share their text (csrc/cpu/row_kernel.cpp). NEON's are built by a cross compiler and counted by qemu, which logs a line
for every instruction it steps over.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path

from tests import native_build

SETS, ARM_SETS, DTYPES = ("portable", "avx2"), ("neon", "neonbf16"), ("float32", "bfloat16", "float16")
PASSES = ("statistics", "gradient", "tilted", "scale")  # tilted: the gradient with an entropy bonus
VOCAB = 20011  # odd, so that tails are walked; long enough that a call's own cost is lost in it
ARM_VOCAB = 4001  # a line of log for each instruction takes its time; a call's own cost is up to a tenth here

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
    "neon float32": (7.44, 6.97, 7.91, 0.938),
    "neon bfloat16": (7.29, 8.15, 8.92, 3.21),
    "neon float16": (7.18, 6.9, 7.84, 1.5),
    "neonbf16 float32": (7.44, 6.97, 7.91, 0.938),
    "neonbf16 bfloat16": (7.29, 6.27, 7.21, 1.49),
    "neonbf16 float16": (7.18, 6.9, 7.84, 1.5),
}


def absent() -> str | None:
    """Why this machine cannot count x86's, as a sentence; None if it can."""
    return native_build.absent() or (None if shutil.which("valgrind") else "valgrind is not on the PATH")


def count_by_callgrind(driver: Path, instruction_set: str, dtype: str, walk: str) -> float | None:
    """Instructions an element of one pass; None where the emulated processor lacks the set."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--toggle-collect=gft_counted_pass", "--collect-atstart=no", f"--callgrind-out-file={folder}/out"]
        command = ["valgrind", "--tool=callgrind", *options, driver, instruction_set, dtype, walk, str(VOCAB)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 2:
        return None
    found = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or not found:
        raise RuntimeError(f"callgrind must count {instruction_set} {dtype} {walk}, got:\n{done.stderr[-2000:]}")
    return int(found[1]) / VOCAB


def count_by_qemu(driver: Path, instruction_set: str, dtype: str, walk: str) -> float | None:
    """The same on AArch64: the instructions of the driver's run, less those of a run that makes no pass."""
    steps = (steps_of(driver, instruction_set, dtype, what) for what in (walk, "none"))
    return (next(steps) - next(steps)) / ARM_VOCAB


@cache
def steps_of(driver: Path, instruction_set: str, dtype: str, walk: str) -> int:
    """Instructions from the start of the driver to its end."""
    stepping = native_build.arm_command("-singlestep", "-d", "exec,nochain", "-D", "/dev/stdout")
    command = [*stepping, str(driver), instruction_set, dtype, walk, str(ARM_VOCAB)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"qemu must count {instruction_set} {dtype} {walk}, got:\n{done.stderr[-2000:]}")
    return done.stdout.count("Trace ")


def measure(count: Callable[..., float | None], sets: tuple[str, ...], arm: bool) -> Iterator[tuple[str, float]]:
    """Every pass's name and its instructions an element."""
    with tempfile.TemporaryDirectory() as folder:
        driver = native_build.build(Path(folder), "gft_instructions", arm)
        for instruction_set, dtype, walk in product(sets, DTYPES, PASSES):
            counted = count(driver, instruction_set, dtype, walk)
            if counted is not None:
                yield f"{instruction_set} {dtype} {walk}", counted


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
    counts = {}
    for reason, counter in (
        (absent(), (count_by_callgrind, SETS, False)),
        (native_build.absent(arm=True), (count_by_qemu, ARM_SETS, True)),
    ):
        if reason is None:
            counts.update(measure(*counter))
        else:
            print(f"instruction counts of {', '.join(counter[1])} skipped: {reason}")
    for name, number in counts.items():
        print(f"{name:<28}{number:8.3f} of {limit_of(name):g} instructions an element")
    broken = broken_by(counts)
    print(*broken, sep="\n", end="\n" if broken else "")
    return not broken
