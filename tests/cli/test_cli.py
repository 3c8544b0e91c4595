"""The command gft: settings, exit codes, Ctrl-C and resuming, failures that keep the last checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trainer_rig as rig
import yaml

from gft_kernels.cli import main
from gft_kernels.cli.plots import draw
from gft_kernels.cli.settings import load
from gft_kernels.cli.train import rows
from gft_kernels.trainer import GFTConfig
from gft_kernels.trainer.rewards import find

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    rig.llama().save_pretrained(path)
    rig.tokenizer().save_pretrained(path)
    return path


def write_run(tmp_path, model_path, data=None, **options):
    """A configuration file and a data file; returns the path of the former."""
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rig.rows() if data is None else data)))
    settings = {
        "model": str(model_path), "data": str(tmp_path / "rows.jsonl"), "output_dir": str(tmp_path / "run"),
        "rewards": ["trainer_rig:digit_count"], "num_demonstrations": 2, "num_generations": 2,
        "max_completion_length": 10, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1,
        "max_steps": 3, "log_completions_steps": 2, "disable_tqdm": True, "use_cpu": True, "save_strategy": "steps",
        "save_steps": 1,
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**settings, **options}))
    return str(path)


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


def test_resuming_goes_on_to_the_same_end(tmp_path, model_path):
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    config = write_run(tmp_path, model_path, max_steps=4, eval_data=str(tmp_path / "rows.jsonl"))
    assert main(["train", "--config", config, "--output_dir", str(straight)]) == 0
    # The same run, as if it had ended after step 2: only its second checkpoint is there.
    cut.mkdir()
    (straight / "checkpoint-2").rename(cut / "checkpoint-2")
    (cut / "checkpoint-9").mkdir()  # cut short while being written: has no trainer_state.json
    assert main(["train", "--config", config, "--output_dir", str(cut), "--resume"]) == 0
    assert (cut / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--taw", "0.5"], "key `taw` must be an option of gft train, got one that is not; did you mean `tau`?"),
        (["--tau", "2"], "tau must lie in [0, 1], got 2"),
        (["--tau", "high"], "key `tau` must be float, got 'high'"),
        (["--num_generations", "2.5"], "key `num_generations` must be int, got 2.5"),
        (["--token_metrics", "maybe"], "key `token_metrics` must be bool, got 'maybe'"),
        (["--tau"], "flag --tau must be followed by a value, got nothing"),
        (["tau=1"], "flags must have the form --key value, got 'tau=1'"),
        (["--resume"], "--resume must find a checkpoint in output_dir, got none"),
        (["--data", "nowhere.jsonl"], "data must be a file, got 'nowhere.jsonl'"),
        (["--rewards", "nothing:here"], "reward function must be importable, got 'nothing:here'"),
        (["--rollout_fn", "gft_kernels:absent"], "module gft_kernels has no 'absent'"),
        (["--rollout", "vllm"], "rollout must be one that can sample here, got 'vllm'; vllm is not installed"),
        (["--eval_strategy", "steps"], "eval_data must be given where eval_on_start or eval_strategy asks"),
        (["--model", "/no/such/model"], "/no/such/model"),
        (["--lr_scheduler_type", "wavy"], "wavy is not a valid SchedulerType"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, model_path, capsys, flags, message):
    config = write_run(tmp_path, model_path)
    assert main(["train", "--config", config, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_malformed_row_is_named_by_file_line_and_field_before_training(tmp_path, model_path, capsys):
    data = rig.rows()
    data[4]["demonstrations"] = "1+1=2."
    config = write_run(tmp_path, model_path, data)
    assert main(["train", "--config", config]) == 2
    assert f"{tmp_path / 'rows.jsonl'}, line 5: field `demonstrations` must be" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_configuration_that_is_no_yaml_or_absent_is_named(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("tau: [1")
    assert main(["train", "--config", str(tmp_path / "a.yaml")]) == 2
    assert main(["train", "--config", str(tmp_path / "b.yaml")]) == 2
    assert main(["train"]) == 2
    errors = capsys.readouterr().err
    assert "a.yaml must be YAML, got" in errors and "there is no such file" in errors
    assert "key `model` must be given" in errors


def test_a_finished_run_is_not_overwritten(tmp_path, model_path, capsys):
    config = write_run(tmp_path, model_path)
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-3" / "trainer_state.json").write_text("{}")
    assert main(["train", "--config", config]) == 2
    assert "add --resume or choose another one" in capsys.readouterr().err


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


def environment():
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def gft(*arguments, **options):
    command = [sys.executable, "-m", "gft_kernels.cli", *arguments]
    return subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True, **options)


def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(tmp_path, model_path):
    config = write_run(tmp_path, model_path, max_steps=100_000, save_steps=100_000, log_completions_steps=0)
    process = gft("train", "--config", config, stdout=subprocess.DEVNULL)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 90
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 3):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "finishing this step, then saving" in error and "with --resume" in error
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*/trainer_state.json")
    stopped = json.loads(checkpoint.read_text())["global_step"]
    assert stopped >= 3
    sys.path.insert(0, str(ROOT / "tests"))
    assert main(["train", "--config", config, "--resume", "--max_steps", str(stopped + 2)]) == 0
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps[-1] == stopped + 2 and steps.count(stopped + 1) == 1
