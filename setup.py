"""Builds gft_kernels/_C with CMake where that is possible. Everything else about the package is in pyproject.toml.

GFT_BUILD chooses what is compiled:
  auto  (default) the CPU kernels if there is a C++ compiler, the CUDA kernels as well if there are nvcc and an NVIDIA
        driver (compiling them takes about a minute, which a machine without a GPU should not pay). What cannot be
        built is left out: the install succeeds, in pure Python if need be, and says so.
  cpu   the CPU kernels; without a compiler the install fails.
  cuda  the CPU and the CUDA kernels; needs nvcc, no GPU. Without nvcc the install fails.
  none  pure Python.
GFT_CUDA_ARCHITECTURES, CMake's list (90-real, or "80-real;90-real"), replaces the targets chosen by what nvcc knows.
No torch is needed: the kernels see addresses and strides.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CHOICES = ("auto", "cpu", "cuda", "none")


def chosen_build() -> str:
    build = os.environ.get("GFT_BUILD", "auto")
    if build not in CHOICES:
        raise SystemExit(f"GFT_BUILD must be one of {', '.join(CHOICES)}, got {build!r}; unset it for auto")
    return build


def find_program(*names: str) -> str | None:
    """The first program found: on the path, or beside this Python (a virtual environment that is not activated)."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return next((found for found in (shutil.which(name, path=path) for name in names if name) if found), None)


def missing_for_cpu() -> str | None:
    """What keeps the CPU kernels from being built here."""
    if find_program(os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++") is None:
        return "no C++ compiler was found"
    if find_program("cmake") is None:
        return "cmake was not found"
    try:
        import pybind11  # noqa: F401
    except ImportError:
        return "pybind11 was not found"
    return None


def missing_for_cuda() -> str | None:
    if not any((ROOT / "csrc" / "cuda").glob("*.cu")):
        return "csrc/cuda holds no kernels"
    if find_program(os.environ.get("CUDACXX", ""), "nvcc", "/usr/local/cuda/bin/nvcc") is None:
        return "nvcc was not found"
    return None


def has_nvidia_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or find_program("nvidia-smi") is not None


class CMakeBuild(build_ext):
    """Configures and builds the one extension with CMake, in the temporary folder setuptools gives."""

    def build_extension(self, ext: Extension) -> None:
        build = chosen_build()
        reason = missing_for_cpu()
        if reason is None and build == "cuda":
            reason = missing_for_cuda()
        if reason is not None and build != "auto":
            raise SystemExit(f"GFT_BUILD must be something this machine can build, got {build!r}: {reason}; "
                             "install what is missing, or use GFT_BUILD=none for pure Python")  # fmt: skip
        if reason is None:
            reason = self.try_cmake(ext, build)
        if reason is not None:
            print(f"gft_kernels is installed without its C++ kernels: {reason}.", file=sys.stderr)

    def try_cmake(self, ext: Extension, build: str) -> str | None:
        """Build; with auto a failure is a reason, not an error, and a failure with CUDA leads to a try without."""
        cuda = build == "cuda" or (build == "auto" and missing_for_cuda() is None and has_nvidia_driver())
        try:
            self.run_cmake(ext, cuda)
        except subprocess.CalledProcessError as error:
            if build != "auto":
                raise SystemExit(f"gft_kernels: {error}") from error
            if cuda:
                print("gft_kernels: the CUDA kernels did not build; building the CPU kernels alone.", file=sys.stderr)
                return self.try_cmake(ext, "cpu")
            return f"CMake failed with exit status {error.returncode}; see its output above"
        return None

    def run_cmake(self, ext: Extension, cuda: bool) -> None:
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        folder = Path(self.build_temp).resolve() / ("cuda" if cuda else "cpu")
        folder.mkdir(parents=True, exist_ok=True)
        cmake, ninja = find_program("cmake"), find_program("ninja")
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        options = [
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DGFT_CUDA={'ON' if cuda else 'OFF'}",
        ]
        assert cmake is not None
        subprocess.run([cmake, "-S", str(ROOT), "-B", str(folder), *generator, *options], check=True)
        subprocess.run([cmake, "--build", str(folder), "--target", "_C", "--parallel"], check=True)


# optional: setuptools then accepts a build that left no file behind.
extensions = [] if chosen_build() == "none" else [Extension("gft_kernels._C", sources=[], optional=True)]
setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild})
