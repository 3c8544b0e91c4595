"""Who may import whom: the architecture, enforced on the source text."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "gft_kernels"

LAYERS = [
    {"large_pages"},
    {"formulas", "options", "layout", "memo"},
    {"surrogates", "_extension"},
    {"checks", "triton_kernels"},
    {"linear_checks", "advantages", "importance", "arguments"},
    {"sequences"},
    {"objectives"},
    {"calls", "backends"},
    {"distributed"},
    {"linear"},
    {"operators"},
    {"api"},
    {"data", "model"},
    {"trainer", "__main__"},
    {"integrations"},
    {"cli"},
]
"""From the ground up; rooms of one layer know nothing of each other."""
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
MODULES = sorted(
    p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py") if p.name != "__init__.py" or p.parent != PACKAGE
)


def room_of(module: Path) -> str:
    return module.parts[0].removesuffix(".py")


@functools.cache
def imports(path: Path) -> list[str]:
    """Dotted names a file imports, wherever the statement stands, and what it hands to import_module as text."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            found += [text_of(node.args[0])] if node.args else []
    return found


def text_of(node: ast.expr) -> str:
    """The text an expression starts with: all of a constant, an f-string up to its first hole."""
    first = node.values[0] if isinstance(node, ast.JoinedStr) and node.values else node
    return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else ""


def rooms_imported(path: Path) -> list[tuple[str, str]]:
    """(room, dotted name) of what a file imports from the library; of its front door, the room a name comes from."""
    found = []
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "gft_kernels" and len(parts) > 1:
            found.append((FRONT_DOOR.get(parts[1], parts[1]), name))
    return found


FRONT_DOOR = {name.split(".")[-1]: name.split(".")[1] for name in imports(PACKAGE / "__init__.py")}


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_room_imports_only_from_below(module):
    room = room_of(module)
    assert room in RANK, f"{room} has no layer; add it to LAYERS and to ARCHITECTURE.md"
    for other, name in rooms_imported(PACKAGE / module):
        if other == room:
            if room == "backends":
                assert module.name == "__init__.py", f"{module} imports {name}: backends never import each other"
        elif other in RANK:
            assert RANK[other] < RANK[room], f"{module} imports {name}, which does not lie below it"


def files_imported(module: Path) -> set[Path]:
    """The library's files a file imports, also inside its functions; not what only a type checker reads."""
    found = set()
    tree = ast.parse((PACKAGE / module).read_text())
    conditions = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    typing_only = [child for node in conditions if "TYPE_CHECKING" in ast.unparse(node.test) for child in node.body]
    skipped = {id(inner) for child in typing_only for inner in ast.walk(child)}
    for node in ast.walk(tree):
        if not isinstance(node, (ast.ImportFrom, ast.Import)) or id(node) in skipped:
            continue
        prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        for alias in node.names:
            parts = (prefix + alias.name).split(".")
            if parts[0] != "gft_kernels":
                continue
            for path in (Path(*parts[1:]), Path(*parts[1:-1])):
                if path == Path("."):
                    break
                if path.with_suffix(".py") in MODULES:
                    found.add(path.with_suffix(".py"))
                    break
                if path / "__init__.py" in MODULES:
                    found.add(path / "__init__.py")
                    break
    return found - {module}


def test_no_file_imports_itself_in_a_circle():
    """Also inside trainer, model, data and integrations, and through imports inside functions."""
    graph = {module: sorted(files_imported(module)) for module in MODULES}
    done: set[Path] = set()

    def visit(module: Path, road: tuple[Path, ...]) -> None:
        assert module not in road, f"a circle: {' -> '.join(map(str, (*road[road.index(module) :], module)))}"
        if module not in done:
            for other in graph[module]:
                visit(other, (*road, module))
            done.add(module)

    for module in graph:
        visit(module, ())


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
