"""What the command says and returns: 2 and one sentence for what the user wrote, 1 for a training that failed."""

from __future__ import annotations

import io
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import trainer_rig as rig
import yaml
from cli_rig import ROOT, write_run

from gft_kernels.cli import main

pytestmark = pytest.mark.usefixtures("undrawn")

MODULES = {
    "broken_syntax": "def reward(:\n    pass\n",
    "fails_on_import": "raise RuntimeError('no licence found')\n",
    "exits_on_import": "raise SystemExit(0)\n",
    "exits": "def reward(prompts, completions, **columns):\n    raise SystemExit(0)\n",
    "reads": "def exits(path):\n    raise SystemExit(0)\n\n\ndef fails(path):\n    return [][7]\n\n\n"
    "def nothing(path):\n    pass\n",
}


@pytest.fixture
def run(tmp_path, model_path, monkeypatch):
    """Writes a run, its data and modules of the user's beside it; the folder is the current one."""
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
        sys.modules.pop(name, None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return lambda data=None, **options: write_run(tmp_path, model_path, data, **options)


def assert_one_sentence(error: str, message: str) -> None:
    lines = [line for line in error.splitlines() if line.strip() and "it/s]" not in line]  # no progress bars
    assert len(lines) == 1 and lines[0].startswith("gft ") and message in lines[0], error


FLAGS = [
    # flags
    (["--taw", "0.5"], "key `taw` must be an option of gft train, got one that is not; did you mean `tau`?"),
    (["--dry-rnu", "1"], "key `dry_rnu` must be an option of gft train, got one that is not; did you mean `dry_run`?"),
    (["--tau"], "flag --tau must be followed by a value, got nothing"),
    (["--tau", "--seed", "1"], "flag --tau must be followed by a value, got '--seed'"),
    (["tau=1"], "flags must have the form --key value, got 'tau=1'"),
    (["--tau", "[0.1"], "flag --tau must be YAML, got "),
    (["--tau", "{a: 1, a: 2}"], "flag --tau must be YAML, got key `a` twice"),
    (["--run_name", "[" * 3000], "flag --run_name must be YAML, got "),
    (["--ranks", "2"], "--ranks must be at least 1 and come with --dry-run"),
    # what TrainingArguments has for scripts of one's own
    (["--resume_from_checkpoint", "run"], "key `resume_from_checkpoint` must be left out, got 'run'; use --resume"),
    (["--resume_from_checkpoint", "true"], "key `resume_from_checkpoint` must be left out, got True; use --resume"),
    (["--do_train", "false"], "key `do_train` must be left out, got False; gft train always does"),
    (["--do_eval", "true"], "key `do_eval` must be left out, got True; set eval_data and eval_strategy"),
    (["--do_predict", "true"], "key `do_predict` must be left out, got True; set eval_data"),
    (["--local_rank", "1"], "key `local_rank` must be left out, got 1; torchrun says it"),
    (["--label_names", "a"], "key `label_names` must be left out, got 'a'; the responses are what is learnt"),
    (["--prediction_loss_only", "true"], "prediction_loss_only must be False, got True; evaluation"),
    (["--include_for_metrics", "loss"], "include_for_metrics must be [], got ['loss']; evaluation"),
    (["--eval_do_concat_batches", "false"], "eval_do_concat_batches must be True, got False; evaluation"),
    (["--length_column_name", "n"], "key `length_column_name` must be left out, got 'n'; the length of a group is"),
    # values
    (["--tau", "2"], "tau must lie in [0, 1], got 2"),
    (["--tau", "high"], "key `tau` must be float, got 'high'"),
    (["--reward_weights", "1, x"], "key `reward_weights` must be float, got 'x'"),
    (["--num_generations", "2.5"], "key `num_generations` must be int, got 2.5"),
    (["--token_metrics", "maybe"], "key `token_metrics` must be bool, got 'maybe'"),
    (["--lr_scheduler_type", "wavy"], "wavy is not a valid SchedulerType"),
    (["--hub_token", "7"], "key `hub_token` must be str, got a value"),
    (["--learning_rate", "-1e-6"], "learning_rate must be 0 or positive and finite, got -1e-06"),
    (["--learning_rate", ".nan"], "learning_rate must be 0 or positive and finite, got nan"),
    (["--learning_rate", "1e400"], "learning_rate must be 0 or positive and finite, got inf"),
    (["--weight_decay", "-0.1"], "weight_decay must be 0 or positive and finite, got -0.1"),
    (["--max_grad_norm", "nan"], "max_grad_norm must be 0 or positive and finite, got nan"),
    (["--warmup_steps", "-3"], "warmup_steps must be 0 or positive and finite, got -3"),
    (["--adam_beta2", "1"], "adam_beta2 must lie in [0, 1), got 1"),
    (["--per_device_train_batch_size", "0"], "per_device_train_batch_size must be at least 1, got 0"),
    (["--gradient_accumulation_steps", "-1"], "gradient_accumulation_steps must be at least 1, got -1"),
    (["--num_train_epochs", "nan"], "num_train_epochs must be positive and finite, got nan"),
    (["--max_steps", "0"], "max_steps must be at least 1, or -1 for whole epochs, got 0"),
    (["--logging_steps", "-1"], "logging_steps must be positive, got -1"),
    (["--reward_weights", "[.nan]"], "reward_weights must be a list of finite numbers of float32, got [nan]"),
    (["--backend", "cuda"], "backend must be able to serve the call, got 'cuda': "),
    (["--rollout", "vllm"], "rollout must be one that can sample here, got 'vllm'; vllm is not installed"),
    (["--eval_strategy", "steps"], "eval_data must be given where eval_on_start or eval_strategy asks"),
    # files and names
    (["--data", "nowhere.jsonl"], "data must be a file, got 'nowhere.jsonl'"),
    (["--eval_data", "nowhere.jsonl"], "eval_data must be a file, got 'nowhere.jsonl'"),
    (["--eval_data", "rows"], "eval_data must be a file, got 'rows'"),
    (["--eval_reader", "reads:absent", "--eval_data", "rows.jsonl"], "eval_reader must exist, got 'reads:absent'"),
    (["--eval_reader", "reads:fails", "--eval_data", "rows.jsonl"], "eval_reader must read 'rows.jsonl', got IndexErr"),
    (["--model", "/no/such/model"], "model must be a folder or the name of a model on the hub, got '/no/such/model'"),
    (["--model", "no/such/model"], "model must be a folder or the name of a model on the hub, got 'no/such/model'"),
    (["--model", "nobody/nothing"], "model must be a folder or the name of a model on the hub, with a tokenizer, got"),
    (["--tokenizer", "./none"], "tokenizer must be a folder or the name of a model on the hub, got './none'"),
    (["--output_dir", "rows.jsonl/run"], "output_dir must be a writable folder, got 'rows.jsonl/run'; Not"),
    (["--output_dir", "/proc/nothing"], "output_dir must be a writable folder, got '/proc/nothing'"),
    (["--resume"], "--resume must find a whole checkpoint in output_dir, got none"),
    # the user's own code
    (["--rewards", "nothing:here"], "reward function must be importable, got 'nothing:here'"),
    (["--rewards", "broken_syntax:reward"], "reward function must be importable, got 'broken_syntax:reward'; SyntaxE"),
    (["--rewards", "fails_on_import:reward"], "RuntimeError: no licence found"),
    (["--rewards", "exits_on_import:reward"], "reward function must be importable, got 'exits_on_import:reward'; Syst"),
    (["--rollout_fn", "gft_kernels:absent"], "module gft_kernels has no 'absent'"),
    (["--reader", "reads:absent"], "reader must exist, got 'reads:absent'"),
    (["--reader", "reads:exits"], "reader must read "),
    (["--reader", "reads:nothing"], "what reader returns must be a list of rows or a datasets.Dataset, got NoneType"),
    (["--reader", "reads:fails"], "IndexError: list index out of range ("),
]


@pytest.mark.parametrize(("flags", "message"), FLAGS, ids=[" ".join(flags)[:40] for flags, _ in FLAGS])
def test_a_wrong_flag_is_one_sentence_and_exit_code_2(run, capsys, flags, message):
    assert main(["train", "--config", run(), *flags]) == 2
    assert_one_sentence(capsys.readouterr().err, message)
    assert not Path("run").exists()


@pytest.mark.parametrize("flags", [["--rewards", "broken_syntax:reward"], ["--reader", "reads:exits"], ["--fsdp", "7"]])
def test_a_dry_run_says_the_same(run, capsys, flags):
    config, said = run(), []
    for dry in ([], ["--dry-run"]):
        assert main(["train", "--config", config, *flags, *dry]) == 2
        said.append(capsys.readouterr().err)
    assert said[0] == said[1]
    assert_one_sentence(said[0], "gft train: ")


CONFIGURATIONS = [
    (b"tau: [1", "must be YAML, got"),
    (b"tau: 1\nseed: 3\n\ntau: 0\nrun_name: x\n", "must be YAML, got key `tau` twice, the second time in line 4."),
    (
        b"tau: 1\naccelerator_config: {split_batches: false,\n split_batches: true}\n",
        "got key `split_batches` twice, the second time in line 3.",
    ),
    (b"1: x\n", "key `1` must be an option of gft train"),
    (b"true: x\n", "key `True` must be an option of gft train"),
    (b"- a\n- b\n", "must hold keys and values, got list"),
    (b"", "must hold keys and values, got NoneType"),
    (b"run_name: \xff\n", "must be UTF-8, got another encoding"),
    (b"run_name: a\x00b\n", "must be YAML, got"),
    (b"run_name: 2024-99-99\n", "must be YAML, got"),
    (b"run_name: !!python/object:os.system x\n", "must be YAML, got"),
    (b"\xef\xbb\xbftau: 1\n", "key `model` must be given"),  # the mark in front is no part of the first key
    (b"model: m\ndata: d\noutput_dir: ''\n", "key `output_dir` must be given"),
]


@pytest.mark.parametrize(("text", "message"), CONFIGURATIONS, ids=lambda value: repr(value)[:40])
def test_a_configuration_that_cannot_be_read_is_one_sentence(tmp_path, capsys, text, message):
    path = tmp_path / "a.yaml"
    path.write_bytes(text)
    assert main(["train", "--config", str(path)]) == 2
    assert_one_sentence(capsys.readouterr().err, message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "gft train: key `model` must be given"),
        (["train", "--config", "none.yaml"], "--config must be a YAML file that can be read, got 'none.yaml'; No such"),
        (["train", "--config", "."], "--config must be a YAML file that can be read, got '.'; Is a directory"),
        (["plot", "none"], "gft plot: run must be a directory with metrics.jsonl, got 'none'"),
        (["demo", "--only", "gsm8k", "--data", "none"], "gft demo: "),
        (["demo", "--only", "digit-sum", "--out", "rows.jsonl"], "gft demo: "),
    ],
)
def test_what_is_not_there_is_one_sentence(run, capsys, arguments, message):
    run()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert_one_sentence(error, message)


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train", "--config"], ["train", "--ranks", "x"], ["plot", "-x"]])
def test_what_the_command_does_not_know_ends_in_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "gft" in error and "Traceback" not in error


def test_a_malformed_row_is_named_by_file_line_and_field_before_training(run, tmp_path, capsys):
    data = rig.rows()
    data[4]["demonstrations"] = "1+1=2."
    assert main(["train", "--config", run(data)]) == 2
    assert_one_sentence(capsys.readouterr().err, f"{tmp_path / 'rows.jsonl'}, line 5: field `demonstrations` must be")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_torn_model_is_named(run, tmp_path, model_path, capsys):
    torn = tmp_path / "torn"
    torn.mkdir()
    for path in model_path.iterdir():
        (torn / path.name).write_bytes(path.read_bytes()[: 2000 if path.suffix == ".safetensors" else None])
    assert main(["train", "--config", run(model=str(torn))]) == 2
    assert_one_sentence(capsys.readouterr().err, f"model must have whole weights, got {str(torn)!r}; ")


def test_a_reward_that_exits_is_a_failed_training(run, capsys):
    assert main(["train", "--config", run(), "--rewards", "exits:reward"]) == 1
    error = capsys.readouterr().err
    assert "raised SystemExit: 0" in error and "no checkpoint was saved" in error and "Traceback" not in error


def test_a_failing_reward_names_the_row_and_keeps_the_checkpoint(run, tmp_path, capsys):
    data = rig.rows()
    data[5]["answer"] = 7  # not text: str.endswith raises
    assert main(["train", "--config", run(data, train_sampling_strategy="sequential")]) == 1
    error = capsys.readouterr().err
    assert "digit_count raised TypeError" in error and "rows.jsonl, line 6" in error and "Traceback" not in error
    assert f"go on from {tmp_path / 'run' / 'checkpoint-2'} with --resume" in error


@pytest.mark.parametrize("limit", [12_000, 80_000], ids=["the model", "the optimizer"])
def test_a_full_disk_while_saving_is_a_sentence(run, model_path, capsys, limit):
    """A limit on the size of a file stands in for the disk: the model has 62 KB, its optimizer twice that."""
    assert 20_000 < (model_path / "model.safetensors").stat().st_size < 80_000
    config, before = run(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        assert main(["train", "--config", config, "--log_completions_steps", "0"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    assert "Traceback" not in error and "no checkpoint was saved" in error, error


SHOWS = """
def reward(prompts, completions, note, **columns):
    print('scored', note[0], '\\u23ce')
    return [float(len(text)) for text in completions]
"""


@pytest.fixture
def run_that_shows(run, tmp_path):
    """Completions that hold a line break, shown as a sign no narrow console has, and rows with an emoji."""
    (tmp_path / "shows.py").write_text(SHOWS)
    data = [row | {"note": "\N{ROCKET}"} for row in rig.rows()]
    return run(data, max_steps=1, log_completions_steps=1, disable_tqdm=False, rewards=["shows:reward"])


def test_a_process_of_its_own_with_modules_beside_it_and_a_console_of_ascii(run_that_shows, tmp_path):
    """No terminal. The folder holds a matplotlib.py of the user's, who draws no curves: the real one does."""
    (tmp_path / "matplotlib.py").write_text("raise RuntimeError('shadow')\n")
    environment = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-m", "gft_kernels.cli", "train", "--config", run_that_shows]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env={**os.environ, **environment}, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    assert rb"scored \U0001f680 \u23ce" in done.stdout and b"step     1  loss" in done.stdout
    assert (tmp_path / "run" / "curves.png").is_file()


def test_a_console_of_one_byte_a_character_ends_nothing(run_that_shows, monkeypatch):
    shown, error = io.BytesIO(), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="cp1252"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(error, encoding="cp1252"))
    code = main(["train", "--config", run_that_shows])
    sys.stdout.flush()
    assert code == 0, error.getvalue()
    assert rb"scored \U0001f680 \u23ce" in shown.getvalue() and b"step     1  loss" in shown.getvalue()


def test_a_tracker_that_is_not_installed_is_named(run, capsys, monkeypatch):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    assert main(["train", "--config", run(), "--report_to", "wandb"]) == 2
    assert_one_sentence(
        capsys.readouterr().err, "report_to must name what is installed, got 'wandb', which is not; pip install wandb."
    )


def test_a_warning_for_users_is_a_sentence(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # which the command sets
    assert main(["plot", "nowhere"]) == 2
    of = {kind: warnings.formatwarning("rewards differ", kind, "a.py", 7) for kind in (UserWarning, FutureWarning)}
    assert list(of.values()) == ["UserWarning: rewards differ\n", "FutureWarning: rewards differ (a.py:7)\n"]


def test_a_token_is_in_no_file_of_the_run(run, tmp_path):
    config = run(max_steps=1, lr_scheduler_type="cosine", lr_scheduler_kwargs={"num_cycles": 0.5})
    assert main(["train", "--config", config, "--hub_token", "hf_secretOne"]) == 0
    record = tmp_path / "run" / "run.yaml"
    assert record.stat().st_mode & 0o777 == 0o600
    assert "hub_token is not written down" in record.read_text()
    assert yaml.safe_load(record.read_text())["lr_scheduler_kwargs"] == {"num_cycles": 0.5}
    holding = [p for p in (tmp_path / "run").rglob("*") if p.is_file() and b"hf_secretOne" in p.read_bytes()]
    assert (tmp_path / "run" / "training_args.bin").is_file() and not holding


def test_a_secret_is_a_key_that_ends_in_one(tmp_path):
    from gft_kernels.cli.folder import without_secrets
    from gft_kernels.cli.settings import _hidden

    values = {
        "hub_token": "x", "tokenizer": "t", "token_metrics": True, "aws_secret_access_key": "x", "keys": "k",
        "nested": {"API_KEY": "x", "deep": [{"password": "x"}]},
    }  # fmt: skip
    hidden = {key: _hidden(value, key) for key, value in values.items()}
    kept = {"tokenizer": "t", "token_metrics": True, "keys": "k", "nested": {"deep": [{}]}}
    assert without_secrets(hidden) == kept and "'x'" not in repr(hidden)
