"""What is shipped: the source distribution holds the project, the wheel the package; building needs no torch.

Builds run in a copy of the sources, without network and without torch: a `torch` that fails when imported stands first
on the path. How the C++ build chooses and fails is test_build.py's subject.
"""

from __future__ import annotations

import json
import re
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import shipped
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import gft_kernels
from gft_kernels import __main__ as report
from gft_kernels import backends

tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")
ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]


@pytest.fixture(scope="module")
def pure_wheel(sources, environment, tmp_path_factory) -> Path:
    return shipped.wheel(sources, tmp_path_factory.mktemp("wheel"), environment)


@pytest.mark.parametrize("folder", ["gft_kernels", "csrc", "python_api", "tests", "benchmarks", "docs", "examples"])
def test_the_source_distribution_holds_every_source(sources, folder):
    assert shipped.files_under(sources, folder) == shipped.files_under(ROOT, folder) != set()


@pytest.mark.parametrize("name", ["CMakeLists.txt", "setup.py", "pyproject.toml", "Makefile", "requirements.lock",
                                  "requirements-demo.lock", "LICENSE", "README.md", "CITATION.cff",
                                  "mkdocs.yml"])  # fmt: skip
def test_the_source_distribution_builds_and_is_complete(sources, name):
    assert (sources / name).read_text() == (ROOT / name).read_text()


def test_the_wheel_holds_the_package_and_its_data_and_nothing_else(pure_wheel):
    with zipfile.ZipFile(pure_wheel) as archive:
        names = set(archive.namelist())
    package = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert package == shipped.files_under(ROOT, "gft_kernels")
    assert "gft_kernels/py.typed" in package
    data = [name for name in package if name.startswith("gft_kernels/data/samples/")]
    assert any("LICENSE" in name for name in data) and any(name.endswith(".jsonl") for name in data)


def test_without_kernels_the_wheel_serves_every_platform(pure_wheel):
    assert pure_wheel.name.endswith("-py3-none-any.whl")


def test_the_wheel_asks_for_torch_by_a_lower_bound_alone(pure_wheel):
    with zipfile.ZipFile(pure_wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    always = [need for need in metadata.get_all("Requires-Dist") if "extra ==" not in need]
    assert [need for need in always if re.match(r"torch\b", need)] == ["torch>=2.6"]
    assert all(re.fullmatch(r"[\w-]+>=[\d.]+", need) for need in always), always
    assert set(metadata.get_all("Provides-Extra")) == set(EXTRAS)


def locked() -> dict[str, Version]:
    """The versions of the two lock files; of a range, its lower end."""
    pins = {}
    for name in ("requirements.lock", "requirements-demo.lock"):
        for line in (ROOT / name).read_text().splitlines():
            if line and not line.startswith("#"):
                need = Requirement(line)
                lowest = min(Version(clause.version) for clause in need.specifier if clause.operator in ("==", ">="))
                pins[canonicalize_name(need.name)] = lowest
    return pins


def needs_of(extra: str) -> list[Requirement]:
    """An extra's requirements, those of the extras it names included."""
    found = []
    for need in map(Requirement, EXTRAS[extra]):
        found += [need] if need.name != "gft-kernels" else [n for name in need.extras for n in needs_of(name)]
    return found


NOT_LOCKED = {"docs", "vllm"}
"""Extras that neither make demo nor make test needs: the site's, and one that brings its own torch, for GPUs."""


@pytest.mark.parametrize("extra", sorted(set(EXTRAS) - NOT_LOCKED))
def test_every_extra_resolves_to_tested_versions(extra):
    pins = locked()
    for need in needs_of(extra):
        name = canonicalize_name(need.name)
        assert name in pins, f"requirements.lock lacks {name}, which [{extra}] needs"
        assert need.specifier.contains(pins[name]), f"[{extra}] needs {need}, requirements.lock has {pins[name]}"
    assert not [need for need in needs_of(extra) if need.name == "torch"], "torch is the user's"


def test_installing_leaves_torch_as_it_is(sources, environment, tmp_path):
    """What pip would do in this environment: install the package, and nothing besides."""
    options = ["--dry-run", "--no-index", "--no-build-isolation", "--quiet", "--report", str(tmp_path / "report.json")]
    shipped.run(["-m", "pip", "install", *options, str(sources)], tmp_path, {**environment, "PYTHONPATH": ""})
    planned = json.loads((tmp_path / "report.json").read_text())["install"]
    assert [entry["metadata"]["name"] for entry in planned] == ["gft-kernels"]


def test_building_requires_no_torch():
    assert not [need for need in PROJECT["build-system"]["requires"] if re.match(r"(torch|nvidia|triton)\b", need)]


def test_extras_are_spelled_as_they_are_documented():
    pages = [ROOT / "README.md", ROOT / "mkdocs.yml", *ROOT.glob("docs/**/*.md"), *(ROOT / "gft_kernels").rglob("*.py")]
    named = {
        extra
        for page in pages
        for group in re.findall(r"(?:gft-kernels|install '?\.)\[([\w,]+)\]", page.read_text())
        for extra in group.split(",")
    }
    assert "train" in named
    assert named <= set(EXTRAS), f"pyproject.toml has no extra {', '.join(named - set(EXTRAS))}"


def test_one_version_everywhere():
    version = PROJECT["project"]["version"]
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert gft_kernels.__version__ == version == cited[1]
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    "absent, required, code", [(None, ["cpu"], 0), ("no compiler", [], 0), ("no compiler", ["reference", "cpu"], 1)]
)
def test_a_backend_that_is_required_and_absent_fails_the_report(absent, required, code, monkeypatch, capsys):
    monkeypatch.setattr(backends.named("cpu"), "absent", lambda: absent)
    monkeypatch.setattr(report, "parity", lambda name: 0.0)
    assert report.main(["--require", *required] if required else []) == code
    assert f"cpu        {'ready' if absent is None else 'absent: no compiler'}" in capsys.readouterr().out
