"""A model and a tokenizer on disk, as `gft train` is given them; and a run's page without its pictures."""

from __future__ import annotations

import pytest
import trainer_rig as rig

from gft_kernels.cli import report


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    rig.llama().save_pretrained(path)
    rig.tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def undrawn(monkeypatch):
    """Drawing the curves takes four fifths of a run as small as a test's."""
    monkeypatch.setattr(report, "svgs", lambda lines: [])
    monkeypatch.setattr(report, "draw", lambda lines, out: out)
