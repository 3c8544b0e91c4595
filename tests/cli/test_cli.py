"""The command gft: what a run leaves behind, its settings, a failure that keeps the last checkpoint, its plot."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from cli_rig import ROOT, write_run

from gft_kernels.cli import main
from gft_kernels.cli.inputs import rows, spread
from gft_kernels.cli.plots import draw, logged
from gft_kernels.cli.settings import load
from gft_kernels.trainer import GFTConfig, GFTTrainer
from gft_kernels.trainer.rewards import find


def test_a_run_trains_evaluates_draws_and_says_where_everything_lies(tmp_path, model_path, capsys):
    config = write_run(tmp_path, model_path, eval_data=str(tmp_path / "rows.jsonl"), eval_on_start=True)
    assert main(["train", "--config", config, "--tau", "0.5", "--learning-rate=1e-2"]) == 0
    shown = capsys.readouterr().out
    run = tmp_path / "run"
    written = ("metrics.jsonl", "completions.jsonl", "curves.png", "README.md", "report.html")
    for name in ("model.safetensors", "tokenizer.json", *written):
        assert (run / name).is_file(), name
    words = ("eval_reward", "eval_expert_log_likelihood", "reward/sampled", "tau 0.5", "evaluating 8 held-out rows")
    for word in (*words, *written):
        assert word in shown
    record = yaml.safe_load((run / "run.yaml").read_text())
    assert record["learning_rate"] == 0.01 and "eval_rows" not in record  # what was set alone
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps if "eval_runtime" in s] == [0, 3]  # before and after
    assert main(["plot", str(run), "--out", str(tmp_path / "new" / "a.png")]) == 0
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")


def test_evaluation_waits_to_be_asked_for_and_has_its_limit(tmp_path, model_path, undrawn, capsys):
    """Without a terminal: lines that end, no bars, whatever disable_tqdm says; the time left on all but the last."""
    config = write_run(tmp_path, model_path, eval_data=str(tmp_path / "rows.jsonl"), eval_rows=3, disable_tqdm=False)
    assert main(["train", "--config", config, "--per_device_eval_batch_size", "1", "--save_steps", "0.5"]) == 0
    shown, error = capsys.readouterr()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    [line] = [line for line in lines if "eval_runtime" in line]
    assert line["step"] == 3 and line["eval_samples_per_second"] == pytest.approx(3 / line["eval_runtime"], rel=0.01)
    assert "3 of 8 held-out rows are evaluated; eval_rows: null takes all" in error and "\r" not in shown + error
    assert "3 steps of 2 prompts, saved every 50% of the steps; evaluated at the end, 1 prompts at once" in shown
    assert re.search(r"^eval_reward +\d\.\d{4}$", shown, re.MULTILINE)  # no first that is the last
    steps = [line for line in shown.splitlines() if line.startswith("step     ") and "loss" in line]
    assert [" s left" in line for line in steps] == [True, True, False] and "{'loss'" not in shown


def test_the_numbers_at_the_end_are_those_of_the_model_that_is_saved(tmp_path, model_path, undrawn, capsys):
    each = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}  # the first is
    config = write_run(tmp_path, model_path, eval_data=str(tmp_path / "rows.jsonl"), **each, **best)
    assert main(["train", "--config", config]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = (line["eval_loss"] for line in lines if "eval_loss" in line)
    assert first == last and "evaluating 8 held-out rows by the model of step 1" in capsys.readouterr().out


@pytest.mark.parametrize(("count", "chosen"), [(3, [0, 2, 5]), (8, [*range(8)]), (None, [*range(8)])])
def test_rows_to_evaluate_are_spread_over_the_file(count, chosen):
    assert [*spread(range(8), count)] == chosen


def test_a_published_run_has_its_own_page(tmp_path, model_path, undrawn, monkeypatch):
    pushed = []
    monkeypatch.setattr(GFTTrainer, "init_hf_repo", lambda self, *given: None)

    def push(self, commit_message="End of training", **options):
        self.create_model_card()
        pushed.append((tmp_path / "run" / "README.md").read_text())

    monkeypatch.setattr(GFTTrainer, "push_to_hub", push)
    monkeypatch.setattr(GFTTrainer, "_push_from_checkpoint", lambda self, folder: None)
    monkeypatch.setattr(GFTTrainer, "_finish_current_push", lambda self: None)
    assert main(["train", "--config", write_run(tmp_path, model_path, max_steps=1), "--push_to_hub", "true"]) == 0
    assert pushed[-1].startswith("# run\n") and "| `reward/sampled` |" in pushed[-1]


def test_numbers_in_scientific_notation_and_lists_are_read(tmp_path):
    (tmp_path / "a.yaml").write_text("model: m\ndata: d\noutput_dir: o\nlearning_rate: 1e-4\nwarmup_steps: 3\n")
    flags = ["--reward-weights", "[1, 0.5]", "--rewards", "a, b", "--save_strategy", "no"]
    settings, options = load(str(tmp_path / "a.yaml"), flags, "other")
    assert options["save_strategy"] == "no"
    assert options["learning_rate"] == 1e-4 and options["reward_weights"] == [1, 0.5] and options["warmup_steps"] == 3
    assert settings.rewards == ["a", "b"] and settings.data == "other"
    for text, stops in (("so, it", ["so, it"]), ("[a, b]", ["a", "b"])):  # the comma of a text is the text's
        assert load(str(tmp_path / "a.yaml"), ["--stop_strings", text], None)[1]["stop_strings"] == stops
    for text in ("[1e-1, 2]", "1e-1, 2"):
        assert load(str(tmp_path / "a.yaml"), ["--reward_weights", text], None)[1]["reward_weights"] == [0.1, 2.0]


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda p: p.name)
def test_the_examples_are_configurations_whose_parts_are_there(example, tmp_path):
    settings, options = load(str(example), [], None)
    options["bf16"] = False  # needs a GPU
    GFTConfig(**{**options, "output_dir": str(tmp_path)})
    for reward in settings.rewards or []:
        find(reward)
    if settings.data == "sample":
        assert len(rows("sample", settings.reader, "train")) == 256
        assert len(rows("sample", settings.reader, "test")) in (64, 128)


def test_plot_says_what_is_missing(tmp_path, capsys):
    assert main(["plot", str(tmp_path)]) == 2
    assert "must be a directory with metrics.jsonl" in capsys.readouterr().err


def test_the_plot_shows_what_was_logged(tmp_path):
    lines = [{"step": s, "loss": 0.1, "reward/sampled": s / 10, "entropy": 1.0, "grad_norm": 0.5} for s in range(1, 4)]
    lines.append({"step": 2, "loss": 0.1, "reward/sampled": 0.9})  # resumed behind step 1: step 3 is no part of the run
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [line["reward/sampled"] for line in logged(tmp_path)] == [0.1, 0.9]
    assert draw(logged(tmp_path), tmp_path / "curves.png").stat().st_size > 10_000
