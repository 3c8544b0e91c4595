"""The compiled module for a machine with a GPU, made beforehand or there.

    python -m benchmarks.gpu.prebuilt PYTHON   beforehand: builds `gft_kernels/_C` in place for that Python (python3.12)
    python -m benchmarks.gpu.prebuilt          a run's build stage: for this Python and GPU, unless what is there fits

Beforehand no GPU is needed, only nvcc, and it is for sm_90 unless GFT_CUDA_ARCHITECTURES says otherwise. Git ignores
the file, so it has to be carried along with the tree. What it asks of glibc and libstdc++ is compared with what the
machine has (by default Ubuntu 22.04's). A module fits that was made by this file from the sources as they are, loads,
has CUDA kernels, and runs one on the GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.gpu.programs import ROOT, last_line

NEEDED = ("setuptools", "pybind11", "cmake", "ninja")
SUFFIX = "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))"
MISSING = "import importlib.util as u, sys; print(*(name for name in sys.argv[1:] if u.find_spec(name) is None))"
PROBE = """
import sys, torch
from gft_kernels import _extension, __main__
if (reason := _extension.absent()) or not _extension.has_cuda():
    sys.exit(reason or "it has no CUDA kernels")
if torch.cuda.is_available():
    __main__.parity("cuda")
"""
PROBE_S = 60.0
CAPABILITY = "import torch; print(*torch.cuda.get_device_capability(), sep='')"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.prebuilt", description="Build for a GPU machine.")
    parser.add_argument("python", nargs="?", help="an interpreter of the version that the machine with the GPU has")
    parser.add_argument("--glibc", default="2.35", help="of that machine")
    parser.add_argument("--glibcxx", default="3.4.30", help="the newest version that its libstdc++ names")
    options = parser.parse_args(argv)
    if options.python is None:
        return build_here()
    module = build(options.python, "90-real")
    symbols = subprocess.run(["objdump", "-T", module], capture_output=True, text=True, check=True).stdout
    newer = too_new(symbols, {"GLIBC": options.glibc, "GLIBCXX": options.glibcxx})
    print(f"{module.relative_to(ROOT)}: {module.stat().st_size / 1e6:.1f} MB", *newer, sep="\n")
    return 1 if newer else 0


def build_here() -> int:
    """A program each, so that a module that crashes as it loads is built anew too."""
    reason = unfit(place(sys.executable))
    if reason is None:
        print("the module that is here fits")
        return 0
    print(f"building: the module that is here does not fit: {reason}", flush=True)
    asked = subprocess.run([sys.executable, "-c", CAPABILITY], capture_output=True, text=True, cwd=ROOT)
    if asked.returncode != 0:
        sys.exit(f"torch must see a GPU to build for, got {last_line(asked.stderr)}")
    print(build(sys.executable, f"{asked.stdout.strip()}-real"))
    return 0


def unfit(module: Path) -> str | None:
    """Why a module is of no use to this Python and this GPU, or None."""
    if not module.exists():
        return "there is none"
    if not module.read_bytes().endswith(mark()):
        return "it was made from other sources"
    probe = [sys.executable, "-c", PROBE]
    try:
        tried = subprocess.run(probe, capture_output=True, text=True, cwd=ROOT, timeout=PROBE_S)
    except subprocess.TimeoutExpired:
        return f"a small call does not end within {PROBE_S:g} s"
    return None if tried.returncode == 0 else last_line(tried.stderr) or f"exit status {tried.returncode}"


def build(python: str, architectures: str, needed: Sequence[str] = NEEDED) -> Path:
    """The module, built in place, with the mark of what it was made from."""
    environment = {"GFT_CUDA_ARCHITECTURES": architectures} | os.environ | {"GFT_BUILD": "cuda"}
    asked = [python, "-c", MISSING, *needed]
    missing = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
    if missing:
        has = f"{python} without {', '.join(missing)}"
        sys.exit(f"PYTHON must have {', '.join(needed)}, got {has}; install them with its pip")
    touch_what_is_ahead()
    module, made = place(python), mark()
    module.unlink(missing_ok=True)
    built = subprocess.run([python, "setup.py", "build_ext", "--inplace"], cwd=ROOT, env=environment)
    if built.returncode != 0 or not module.exists():
        sys.exit(f"the build failed with exit status {built.returncode}; see its output above")
    with module.open("ab") as end:  # behind what a loader reads
        end.write(made)
    return module


def touch_what_is_ahead() -> None:
    """Sources from a machine whose clock is ahead of this one's: ninja would configure again and again, and give up."""
    for source in sources():
        if source.stat().st_mtime > time.time():
            os.utime(source)


def place(python: str) -> Path:
    suffix = subprocess.run([python, "-c", SUFFIX], capture_output=True, text=True, check=True).stdout.strip()
    return ROOT / "gft_kernels" / f"_C{suffix}"


def sources() -> Iterator[Path]:
    """What the module is compiled from."""
    yield from (ROOT / "CMakeLists.txt", ROOT / "setup.py")
    for folder in ("csrc", "python_api"):
        found = sorted((ROOT / folder).rglob("*"))
        yield from (path for path in found if path.suffix in (".h", ".cpp", ".cu", ".cuh", ".txt"))


def mark() -> bytes:
    """The last bytes of a module that was made from the sources as they are."""
    contents = hashlib.sha256()
    for path in sources():
        contents.update(f"{path.relative_to(ROOT)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return f"\nmade from {contents.hexdigest()}\n".encode()


def too_new(symbols: str, machine: dict[str, str]) -> list[str]:
    """Each library of which a module asks more than the machine has, as a sentence. symbols: as `objdump -T` says."""
    sentences = []
    for library, has in machine.items():
        asked = max(re.findall(rf"\b{library}_([\d.]+)", symbols), key=_version, default="0")
        if _version(asked) > _version(has):
            sentences.append(f"{library} must be at most {has} there, got {asked}; build with an older toolchain")
    return sentences


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


if __name__ == "__main__":
    sys.exit(main())
