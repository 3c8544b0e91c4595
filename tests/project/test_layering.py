"""Who may import whom: the architecture, enforced on the source text."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "gft_kernels"

LAYERS = [
    {"formulas", "options"},
    {
        "checks",
        "linear_call",
        "linear_checks",
        "policy_checks",
        "advantages",
        "registry",
        "_extension",
        "triton_kernels",
    },
    {"backends"},
    {"distributed"},
    {"linear"},
    {"operators"},
    {"loss", "linear_loss", "policy"},
    {"data", "model"},
    {"trainer", "integrations"},
    {"cli", "__main__"},
]
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
MODULES = sorted(
    p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py") if p.name != "__init__.py" or p.parent != PACKAGE
)


def room_of(module: Path) -> str:
    return module.parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Dotted names a file imports, wherever the statement stands."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_room_imports_only_from_below(module):
    room = room_of(module)
    assert room in RANK, f"{room} has no layer; add it to LAYERS and to ARCHITECTURE.md"
    for name in imports(PACKAGE / module):
        parts = name.split(".")
        if parts[0] != "gft_kernels" or len(parts) < 2 or parts[1] not in RANK:
            continue
        assert RANK[parts[1]] <= RANK[room], f"{module} imports {name}, which lies above it"
        if room == "backends" and parts[1] == "backends":
            assert module.name == "__init__.py", f"{module} imports {name}: backends never import each other"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_triton_and_the_extension_have_one_door_each(module):
    for name in imports(PACKAGE / module):
        if name.split(".")[0] == "triton":
            assert room_of(module) == "triton_kernels" or module == Path("backends/triton.py"), (
                f"{module} imports {name}"
            )
        if name == "gft_kernels._C" or name.startswith("gft_kernels._C."):
            assert room_of(module) == "_extension", f"{module} imports {name}"


def includes(path: Path) -> list[str]:
    return re.findall(r'#\s*include\s*[<"]([^>"]+)[>"]', path.read_text())


NATIVE = sorted(p for p in ROOT.glob("csrc/**/*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"})


@pytest.mark.parametrize("path", NATIVE, ids=lambda p: str(p.relative_to(ROOT)))
def test_native_code_knows_nothing_of_torch_python_or_its_neighbour(path):
    side = path.relative_to(ROOT / "csrc").parts[0]
    for header in includes(path):
        assert not header.startswith(("torch/", "ATen/", "c10/", "pybind11/", "Python.h")), (
            f"{path.name} includes {header}"
        )
        other = {"cpu": "cuda/", "cuda": "cpu/"}.get(side)
        if side == "gft":
            assert not header.startswith(("cpu/", "cuda/")), f"the shared {path.name} includes {header}"
        if other is not None and header not in ("cuda/std",):
            assert not header.startswith(other) and f"/{other}" not in header, f"{path.name} includes {header}"


def test_the_border_has_no_torch_header():
    for path in sorted((ROOT / "python_api").glob("*.cpp")):
        assert not [h for h in includes(path) if h.startswith(("torch/", "ATen/", "c10/"))]


def test_importing_the_library_imports_neither_triton_nor_transformers():
    import subprocess
    import sys

    code = (
        "import sys\n"
        "for name in ('triton', 'transformers', 'torch._dynamo', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "import gft_kernels\n"
        "print(gft_kernels.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
