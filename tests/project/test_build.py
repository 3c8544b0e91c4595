"""The build: what GFT_BUILD accepts, the wheel with kernels, their tests in C++, and no instruction set in another."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import shipped

from tests import native_build

ROOT = Path(__file__).parents[2]
QUICK = {"CMAKE_BUILD_TYPE": "None", "CXXFLAGS": "-O1"}
"""What the kernels answer is asked here, not how fast they are; optimised in full they compile twice as long."""


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
        "from gft_kernels.backends import choose\n"
        "import gft_kernels; print(cpu.absent())"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "the C++ kernels are not built or do not load" in run.stdout


@pytest.fixture(scope="module")
def compiled(sources, environment, tmp_path_factory) -> tuple[Path, Path]:
    """A wheel with the CPU kernels, and the sources it was built in: the one build that all below look at."""
    if reason := native_build.absent():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("compiled")
    return shipped.wheel(sources, folder, {**environment, **QUICK, "GFT_BUILD": "cpu"}), folder / "sources"


def cmake_folder(sources: Path) -> Path:
    """Where setup.py had CMake build."""
    (found,) = sources.glob("build/temp*/cpu")
    return found


@pytest.mark.slow
def test_the_wheel_with_kernels_holds_the_compiled_module_and_no_sources_of_it(compiled):
    with zipfile.ZipFile(compiled[0]) as archive:
        names = set(archive.namelist())
    package = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    (module,) = package - shipped.files_under(ROOT, "gft_kernels")
    assert module.startswith("gft_kernels/_C.") and not compiled[0].name.endswith("-none-any.whl")


def test_the_tests_in_cpp_pass(compiled):
    """Formulas, credit and every instruction set the processor has, each against plain double arithmetic."""
    program = native_build.build(cmake_folder(compiled[1]), "gft_test", source=compiled[1])
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.returncode == 0 and "all C++ tests passed" in run.stdout, run.stdout[-2000:]


def test_the_tests_in_cpp_pass_on_aarch64(monkeypatch):
    """Built where the next run finds what has not changed since."""
    if reason := native_build.absent(arm=True):
        pytest.skip(reason)
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)
    program = native_build.build(ROOT / "build" / "aarch64", "gft_test", arm=True)
    run = subprocess.run([*native_build.arm_command(), program], capture_output=True, text=True)
    assert run.returncode == 0 and "all C++ tests passed" in run.stdout, run.stdout[-2000:]
    assert "neonbf16\nrow kernels: neon\n" in run.stdout  # both ran


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="one instruction set on this architecture")
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
@pytest.mark.parametrize("name", ["portable", "avx2", "avx512", "avx512bf16"])
def test_no_instruction_set_leaks(compiled, name):
    """A kernel file defines its table and nothing else that a linker could share with code for other processors."""
    target = cmake_folder(compiled[1]) / f"CMakeFiles/gft_row_{name}.dir/csrc/cpu/row_kernel.cpp.o"
    names = ["nm", "-C", "--defined-only", "--extern-only", str(target)]
    listing = subprocess.run(names, capture_output=True, text=True, check=True)
    symbols = [line.split(maxsplit=2)[2] for line in listing.stdout.splitlines()]
    assert symbols == [f"gft::cpu::kernels_{name}"]
