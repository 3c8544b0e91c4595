"""The C++ of csrc, built by the project's own CMake file: for this processor, or for AArch64 by a cross compiler.

What is built for AArch64 runs here in qemu's user mode. Debian: apt-get install g++-aarch64-linux-gnu qemu-user-static.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
ARM_LIBRARIES = "/usr/aarch64-linux-gnu"


def absent(arm: bool = False) -> str | None:
    """Which tool this machine lacks, as a sentence; None if none."""
    for tool in (ARM_COMPILER, ARM_EMULATOR) if arm else ("c++",):
        if shutil.which(tool) is None:
            return f"{tool} is not on the PATH"
    return None


def build(folder: Path, target: str, arm: bool = False, source: Path = ROOT) -> Path:
    """The program `target` of CMakeLists.txt; what `folder` holds of a build already is taken.

    Raises: RuntimeError with what the compiler said.
    """
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:/usr/bin") or "cmake"
    options = ["-DGFT_TESTS=ON", "-DGFT_PYTHON=OFF"]
    if arm:
        options += ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"]
        options += [f"-DCMAKE_CXX_COMPILER={ARM_COMPILER}"]
    for command in ([cmake, "-S", source, "-B", folder, *options], [cmake, "--build", folder, "--target", target]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"building {target} must succeed, got:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return folder / target


def arm_command(*emulator_options: str) -> list[str]:
    """What a program built for AArch64 is started with here."""
    if platform.machine() in ("aarch64", "arm64"):
        return []
    return [ARM_EMULATOR, "-cpu", "max", "-L", ARM_LIBRARIES, *emulator_options]
