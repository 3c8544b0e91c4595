"""The source distribution, from which everything that is built here is built."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import shipped


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict[str, str]:
    """Pure Python, and no torch to be had."""
    poison = tmp_path_factory.mktemp("no_torch")
    (poison / "torch.py").write_text("raise SystemExit('the build imported torch')\n")
    return {**os.environ, "GFT_BUILD": "none", "PYTHONPATH": str(poison), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


@pytest.fixture(scope="session")
def sources(tmp_path_factory, environment) -> Path:
    return shipped.source_distribution(tmp_path_factory.mktemp("sdist"), environment)
