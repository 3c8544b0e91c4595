"""Instructions an element of the CPU row kernels, counted and held to limits.

On x86 callgrind counts the portable and the AVX2 kernels; it knows no AVX-512, whose loops are read off the compiler's
code, on a processor that need not have it. NEON's are built by a cross compiler and counted by qemu, which logs a line
for every instruction it steps over.
"""

from __future__ import annotations

import math
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
LISTED_SETS, LISTED_PASSES = ("avx512", "avx512bf16"), PASSES[:2]
VOCAB = 20011  # odd, so that tails are walked; long enough that a call's own cost is lost in it
ARM_VOCAB = 4001  # a line of log for each instruction takes its time; a call's own cost is up to a tenth here

# A quarter above what GCC 12 makes of them: room for another compiler's order of instructions, and none for what these
# counts have caught before. A helper that is called instead of inlined costs three times as much, a vector that is
# taken apart into elements five times, one more exponential an element half as much again.
LIMITS = {  # instructions an element, in the order of PASSES
    "portable float32": (12.8, 11.4, 14.0, 1.34),
    "portable bfloat16": (13.0, 24.6, 28.1, 21.3),  # no vector instruction rounds to 16 bits in the portable set
    "portable float16": (31.7, 58.4, 61.6, 53.3),
    "avx2 float32": (3.36, 3.12, 3.78, 0.48),
    "avx2 bfloat16": (3.37, 3.43, 3.98, 1.39),
    "avx2 float16": (3.12, 3.08, 3.7, 0.81),
    "avx512 float32": (1.37, 1.08),
    "avx512 bfloat16": (1.31, 1.19),
    "avx512 float16": (1.24, 1.08),
    "avx512bf16 bfloat16": (1.31, 0.96),
    "neon float32": (7.44, 6.97, 7.91, 0.938),
    "neon bfloat16": (7.29, 7.81, 8.75, 2.62),
    "neon float16": (7.18, 6.9, 7.84, 1.5),
    "neonbf16 float32": (7.44, 6.97, 7.91, 0.938),
    "neonbf16 bfloat16": (7.29, 6.27, 7.21, 1.49),
    "neonbf16 float16": (7.18, 6.9, 7.84, 1.5),
}


def absent() -> str | None:
    """Why this machine cannot count x86's, as a sentence; None if it can."""
    missing = [tool for tool in ("valgrind", "objdump") if shutil.which(tool) is None]
    return native_build.absent() or (f"{missing[0]} is not on the PATH" if missing else None)


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
        if not arm:
            yield from listed(driver).items()


def loops_of(driver: Path) -> Iterator[list[str]]:
    """The instructions between each backward jump of a program and where it goes."""
    command = ["objdump", "--disassemble", "--no-show-raw-insn", str(driver)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"^ *([0-9a-f]+):\t(.+)$", listing, re.MULTILINE)
    places = {address: i for i, (address, _) in enumerate(lines)}
    for i, (_, text) in enumerate(lines):
        jump = re.match(r"j[a-z]+ +([0-9a-f]+) ", text)
        if jump and places.get(jump[1], i) < i:
            yield [text for _, text in lines[places[jump[1]] : i + 1]]


def listed(driver: Path) -> dict[str, float]:
    """Instructions an element of the AVX-512 loops: of each kind the shortest, which has no entropy and no softcap.

    A loop takes four vectors, and an exponential of each, known by vscalefps. The statistics fetch ahead. float16 is
    converted by an instruction, bfloat16 read by shifting its bits, and rounded by an instruction where there is one.
    """
    found: dict[str, float] = {}
    for loop in loops_of(driver):
        text = "\n".join(loop)
        if len(re.findall("vscalefps.*%zmm", text)) != 4:
            continue
        walk = "statistics" if "prefetcht0" in text else "gradient"
        dtype = "float16" if "vcvtph2ps" in text else "bfloat16" if "vpslld" in text else "float32"
        own = "vcvtne2ps2bf16" in text
        name = f"{LISTED_SETS[own]} {dtype} {walk}"
        found[name] = min(found.get(name, math.inf), len(loop) / (4 * 16))
    return found


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
