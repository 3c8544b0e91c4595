"""The same task by several trainers: each trains the model it is given, and all are asked the same."""

from __future__ import annotations

import chat_tokenizers
import pytest

from benchmarks import extraction, extraction_report, plots


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
    file, tiny = tmp_path / "a.jsonl", "--held-out 3 --max-steps 2 --max-completion-length 80"
    monkeypatch.setattr("sys.argv", ["extraction", name, "--model", chat_model, "--save", str(file), *tiny.split()])
    extraction.main()
    (found,) = extraction_report.read(file)
    assert (found["trainer"], found["n"], found["steps"]) == (name, 3, 2) and found["seconds_a_step"] > 0
    assert found["before"].keys() == found["after"].keys() == {"sampled at T = 1", "greedy"}
    # a model of random weights samples nothing right: samples alone teach nothing
    assert weights[0].equal(weights[1]) == (name == "TRL GRPO")
    assert name in capsys.readouterr().out


def test_the_pages_have_every_trainers_runs_together(tmp_path):
    nothing = extraction_report.draw(tmp_path / "a.svg", tmp_path / "none.jsonl")
    assert extraction_report.table([]) == extraction_report.NOT_RUN and not nothing
    file = tmp_path / "results.jsonl"
    for seed, after in ((1, 0.5), (0, 0.1), (0, 1.0)):  # the last one made again
        run = {"trainer": "plain loop", "seed": seed, "n": 8, "steps": 5, "machine": {"cpu": "a CPU"}, "threads": 2}
        run |= {"before": {"sampled at T = 1": 0.0, "greedy": 0.25}, "seconds_a_step": 2.0 + seed}
        run |= {"after": {"sampled at T = 1": after, "greedy": 1.0}, "peak_gib": 4.0 + seed}
        extraction_report.keep(run, file)
    assert [line["seed"] for line in extraction_report.read(file)] == [0, 1]
    table = extraction_report.table(extraction_report.read(file))
    rates = "0.00 [0.00, 0.19] | 0.75 [0.51, 0.90] | 0.25 [0.10, 0.49] | 1.00 [0.81, 1.00]"
    assert f"| plain loop | 2, 5 | {rates} |" in table
    assert "| 3.0 s | 5.0 GiB |" in table and "a CPU, 2 threads, float32." in table
    (plot,) = extraction_report.draw(tmp_path / "a.svg", file)
    assert plots.sources(plot) == {"results.jsonl": plots.digest(file)} and "plain loop" in plot.read_text()
