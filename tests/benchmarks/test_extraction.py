"""The same task by several trainers: each trains the model it is given, and all are asked the same."""

from __future__ import annotations

import json

import chat_tokenizers
import pytest

from benchmarks import extraction


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return chat_tokenizers.model_folder(tmp_path_factory.mktemp("chat"))


@pytest.mark.parametrize("name", extraction.TRAINERS)
def test_every_trainer_takes_its_steps(name, chat_model, tmp_path, monkeypatch, capsys):
    if name.startswith("TRL"):
        pytest.importorskip("trl", reason="trl is not installed: pip install 'gft-kernels[trl]'")
    weights = {}

    def rates(model, *asked):
        weights[len(weights)] = next(model.parameters()).detach().clone()
        return own(model, *asked)

    own = extraction._rates
    monkeypatch.setattr(extraction, "_rates", rates)
    tiny = ["--held-out", "3", "--max-steps", "2", "--max-completion-length", "80"]
    monkeypatch.setattr("sys.argv", ["extraction", name, "--model", chat_model, "--save", str(tmp_path), *tiny])
    extraction.main()
    (file,) = tmp_path.glob("*-0.json")
    found = json.loads(file.read_text())
    assert (found["trainer"], found["n"], found["steps"]) == (name, 3, 2) and found["seconds_a_step"] > 0
    assert found["before"].keys() == found["after"].keys() == {"sampled at T = 1", "greedy"}
    # a model of random weights samples nothing right: samples alone teach nothing
    assert weights[0].equal(weights[1]) == (name == "TRL GRPO")
    assert name in capsys.readouterr().out
