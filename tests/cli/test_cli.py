"""The command gft: what a run leaves behind, its settings, a failure that keeps the last checkpoint, its plot."""

from __future__ import annotations

import json

import pytest
import trainer_rig as rig
import yaml
from cli_rig import ROOT, write_run

from gft_kernels.cli import main
from gft_kernels.cli.inputs import rows
from gft_kernels.cli.plots import draw
from gft_kernels.cli.settings import load
from gft_kernels.trainer import GFTConfig
from gft_kernels.trainer.rewards import find


def test_a_run_trains_evaluates_draws_and_says_where_everything_lies(tmp_path, model_path, capsys):
    config = write_run(tmp_path, model_path, eval_data=str(tmp_path / "rows.jsonl"))
    assert main(["train", "--config", config, "--tau", "0.5", "--learning-rate=1e-2"]) == 0
    shown = capsys.readouterr().out
    run = tmp_path / "run"
    for name in ("model.safetensors", "tokenizer.json", "metrics.jsonl", "completions.jsonl", "curves.png"):
        assert (run / name).is_file(), name
    for word in ("eval_reward", "eval_expert_log_likelihood", "reward/sampled", "curves.png", "tau 0.5"):
        assert word in shown
    assert yaml.safe_load((run / "run.yaml").read_text())["learning_rate"] == 0.01
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps if "eval_runtime" in s] == [0, 3]  # before and after
    assert main(["plot", str(run), "--out", str(tmp_path / "new" / "a.png")]) == 0
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_failing_reward_names_the_row_and_keeps_the_checkpoint(tmp_path, model_path, capsys):
    data = rig.rows()
    data[5]["answer"] = 7  # not text: str.endswith raises
    config = write_run(tmp_path, model_path, data, train_sampling_strategy="sequential")
    assert main(["train", "--config", config]) == 1
    error = capsys.readouterr().err
    assert "digit_count raised TypeError" in error and "rows.jsonl, line 6" in error and "Traceback" not in error
    assert f"go on from {tmp_path / 'run' / 'checkpoint-2'} with --resume" in error


def test_numbers_in_scientific_notation_and_lists_are_read(tmp_path):
    (tmp_path / "a.yaml").write_text("model: m\ndata: d\noutput_dir: o\nlearning_rate: 1e-4\nwarmup_steps: 3\n")
    settings, options = load(str(tmp_path / "a.yaml"), ["--reward-weights", "[1, 0.5]", "--rewards", "a, b"], "other")
    assert options["learning_rate"] == 1e-4 and options["reward_weights"] == [1, 0.5] and options["warmup_steps"] == 3
    assert settings.rewards == ["a", "b"] and settings.data == "other"


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
    lines.append({"step": 2, "loss": 0.1, "reward/sampled": 0.9})  # a resumed run logged step 2 again
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    from gft_kernels.trainer.callbacks import read_metrics

    assert [line["reward/sampled"] for line in read_metrics(tmp_path)] == [0.1, 0.9, 0.3]
    assert draw(tmp_path).stat().st_size > 10_000
