"""The build: what GFT_BUILD accepts, and that no instruction set leaks into another."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import native_build

ROOT = Path(__file__).parents[2]
FLAGS = {
    "portable": [],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4"],
    "avx512bf16": ["-march=x86-64-v4", "-mavx512bf16"],
}


def setup_py(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_an_unknown_choice_is_refused():
    run = setup_py("--version", GFT_BUILD="fast")
    assert run.returncode != 0
    assert "GFT_BUILD must be one of auto, cpu, cuda, none, got 'fast'" in run.stderr


def build_without_tools(folder: Path, build: str) -> subprocess.CompletedProcess:
    """setup.py build_ext where neither PATH nor Python's own folder holds a compiler or cmake."""
    arguments = ["setup.py", "build_ext", "--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    code = (
        f"import sys, runpy; sys.executable = {str(folder / 'python')!r}; sys.argv = {arguments!r};"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    environment = {"PATH": str(folder), "GFT_BUILD": build}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("build", ["auto", "cpu", "cuda", "none"])
def test_without_a_compiler(tmp_path, build):
    pytest.importorskip("setuptools")
    run = build_without_tools(tmp_path, build)
    said = run.stderr.count("gft_kernels is installed without its C++ kernels: no C++ compiler was found")
    if build in ("cpu", "cuda"):
        assert run.returncode != 0
        assert f"GFT_BUILD must be something this machine can build, got '{build}': no C++ compiler" in run.stderr
    else:
        assert run.returncode == 0, run.stderr
        assert said == (1 if build == "auto" else 0)
    assert not list((tmp_path / "lib").rglob("_C*"))


def test_the_extension_is_optional():
    """Without `_C` the package imports, and the CPU backend says why it cannot run."""
    code = (
        "import sys; sys.modules['gft_kernels._C'] = None\n"
        "from gft_kernels.backends import cpu\n"
        "from gft_kernels.registry import choose\n"
        "import gft_kernels; print(cpu.absent())"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "the C++ kernels are not built or do not load" in run.stdout


@pytest.mark.parametrize("arm", [False, True], ids=["here", "AArch64"])
def test_the_tests_in_cpp_pass(tmp_path, arm):
    """Formulas, credit and every instruction set the processor has, each against plain double arithmetic."""
    if reason := native_build.absent(arm):
        pytest.skip(reason)
    program = native_build.build(tmp_path, "gft_test", arm)
    run = subprocess.run([*(native_build.arm_command() if arm else ()), program], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:]
    assert "all C++ tests passed" in run.stdout
    if arm:
        assert "neonbf16\nrow kernels: neon\n" in run.stdout  # both ran


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="one instruction set on this architecture")
@pytest.mark.skipif(shutil.which("g++") is None or shutil.which("nm") is None, reason="needs g++ and nm")
@pytest.mark.parametrize("name", FLAGS)
def test_no_instruction_set_leaks(tmp_path, name):
    """A kernel file defines its table and nothing else that a linker could share with code for other processors."""
    target = tmp_path / f"{name}.o"
    source, simd = ROOT / "csrc" / "cpu" / "row_kernel.cpp", name.removesuffix("bf16")
    flags = ["-std=c++17", "-O1", "-w", "-fno-exceptions", f"-I{ROOT / 'csrc'}", *FLAGS[name]]
    flags += [f"-DGFT_INSTRUCTION_SET={name}", f'-DGFT_SIMD_HEADER="cpu/simd_{simd}.h"']
    subprocess.run(["g++", *flags, "-c", str(source), "-o", str(target)], check=True, timeout=300)
    names = ["nm", "-C", "--defined-only", "--extern-only", str(target)]
    listing = subprocess.run(names, capture_output=True, text=True)
    symbols = [line.split(maxsplit=2)[2] for line in listing.stdout.splitlines()]
    assert len(symbols) == 1 and symbols[0].startswith("gft::cpu::k"), symbols
