"""What is shipped, built as pip builds it: the source distribution of a clean copy, and wheels made of that."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILT = [".git", ".venv", "build", "dist", "runs", "*.egg-info", "__pycache__", "*.so", ".*_cache"]
"""What a clean checkout does not have."""


def run(arguments: list[str], folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def source_distribution(folder: Path, environment: dict[str, str]) -> Path:
    """The unpacked source distribution of a clean copy."""
    shutil.copytree(ROOT, folder / "copy", ignore=shutil.ignore_patterns(*BUILT))
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(["-c", build, str(folder)], folder / "copy", environment)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def wheel(sources: Path, folder: Path, environment: dict[str, str]) -> Path:
    """Built in `folder`/sources, where what it was made of stays."""
    shutil.copytree(sources, folder / "sources")
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    run(["-m", "pip", "wheel", *options, "--wheel-dir", str(folder), str(folder / "sources")], folder, environment)
    (built,) = folder.glob("*.whl")
    return built


def files_under(folder: Path, *names: str) -> set[str]:
    """Files below the named folders that are sources, as paths from `folder`."""
    found = (path for name in names for path in (folder / name).rglob("*") if path.is_file())
    kept = (path for path in found if "__pycache__" not in path.parts and path.suffix not in (".so", ".pyc"))
    return {path.relative_to(folder).as_posix() for path in kept if path.name != ".DS_Store"}
