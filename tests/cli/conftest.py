"""A model and a tokenizer on disk, as `gft train` is given them."""

from __future__ import annotations

import pytest
import trainer_rig as rig


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    rig.llama().save_pretrained(path)
    rig.tokenizer().save_pretrained(path)
    return path
