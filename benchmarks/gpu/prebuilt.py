"""The compiled module, made beforehand for a machine with a GPU: `python -m benchmarks.gpu.prebuilt PYTHON`.

PYTHON (say python3.12) builds `gft_kernels/_C` in place, for sm_90 unless GFT_CUDA_ARCHITECTURES says otherwise; git
ignores the file, so it has to be carried along with the tree. No GPU is needed, only nvcc. What the module asks of
glibc and libstdc++ is compared with what the machine has (by default Ubuntu 22.04's): the build stage of a run is
spared where the module loads, and builds where it does not.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.programs import ROOT

NEEDED = ("setuptools", "pybind11", "cmake", "ninja")
SUFFIX = "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))"
MISSING = "import importlib.util as u, sys; print(*(name for name in sys.argv[1:] if u.find_spec(name) is None))"
Version = tuple[int, ...]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.prebuilt", description="Build for another Python.")
    parser.add_argument("python", help="the interpreter, of the version that the machine with the GPU has")
    parser.add_argument("--glibc", default="2.35", help="of that machine")
    parser.add_argument("--glibcxx", default="3.4.30", help="the newest version that its libstdc++ names")
    options = parser.parse_args(argv)
    module = build(options.python)
    newer = too_new(symbols(module), {"GLIBC": options.glibc, "GLIBCXX": options.glibcxx})
    print(f"{module.relative_to(ROOT)}: {module.stat().st_size / 1e6:.1f} MB", *newer, sep="\n")
    return 1 if newer else 0


def build(python: str, needed: Sequence[str] = NEEDED) -> Path:
    """The module, built in place."""
    environment = {"GFT_CUDA_ARCHITECTURES": "90-real"} | os.environ | {"GFT_BUILD": "cuda"}
    asked = [python, "-c", MISSING, *needed]
    missing = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
    if missing:
        has = f"{python} without {', '.join(missing)}"
        sys.exit(f"PYTHON must have {', '.join(needed)}, got {has}; install them with its pip")
    subprocess.run([python, "setup.py", "build_ext", "--inplace"], cwd=ROOT, env=environment, check=True)
    suffix = subprocess.run([python, "-c", SUFFIX], capture_output=True, text=True, check=True).stdout.strip()
    return ROOT / "gft_kernels" / f"_C{suffix}"


def symbols(module: Path) -> str:
    """The dynamic symbols of a module, as `objdump -T` lists them."""
    return subprocess.run(["objdump", "-T", module], capture_output=True, text=True, check=True).stdout


def too_new(table: str, machine: dict[str, str]) -> list[str]:
    """Each library of which the module asks more than the machine has, as a sentence."""
    sentences = []
    for library, has in machine.items():
        asked = max(map(_version, re.findall(rf"\b{library}_([\d.]+)", table)), default=(0,))
        if asked > _version(has):
            words = ".".join(map(str, asked))
            sentences.append(f"{library} must be at most {has} there, got {words}; build with an older toolchain")
    return sentences


def _version(text: str) -> Version:
    return tuple(int(part) for part in text.split("."))


if __name__ == "__main__":
    sys.exit(main())
