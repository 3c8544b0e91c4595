"""Going on: the same end bit for bit, from the newest whole checkpoint, as the same run, alone in its folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import trainer_rig as rig
from cli_rig import gft, wait_for_steps, write_run

from gft_kernels.cli import folder, main
from gft_kernels.data.manifests import MANIFEST, mark
from gft_kernels.trainer import SaveOnInterrupt
from gft_kernels.trainer.checkpoints import newest_whole

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_path):
    """A run of four steps with a checkpoint after each, never changed; its configuration and its folder."""
    path = tmp_path_factory.mktemp("finished")
    config = write_run(path, model_path, max_steps=4, eval_data=str(path / "rows.jsonl"))
    assert main(["train", "--config", config]) == 0
    return config, path / "run"


@pytest.fixture
def copy(finished, tmp_path):
    """The same run in a folder of the test's; `resume(flags)` goes on there, `weights` are those of its end."""
    config, run = finished
    shutil.copytree(run, tmp_path / "run")
    made = type("Copy", (), {})()
    made.run, made.config = tmp_path / "run", config
    made.weights = (run / "model.safetensors").read_bytes()
    made.resume = lambda *flags: main(["train", "--config", config, "--output_dir", str(made.run), *flags])
    return made


def logged(run) -> list[int]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "loss" in line]


def files_of(run) -> dict:
    """Content of every file but the logs and evaluations, which a run that goes on may add to."""
    skipped = ("metrics.jsonl", "curves.png", "README.md", "report.html", "training_args.bin")
    return {str(p.relative_to(run)): mark(p) for p in run.rglob("*") if p.is_file() and p.name not in skipped}


def test_a_fresh_run_overwrites_none(copy, capsys):
    assert copy.resume() == 2
    assert "add --resume or choose another" in capsys.readouterr().err
    for checkpoint in copy.run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    assert copy.resume() == 2  # the model alone is a run too
    assert f"output_dir must hold no other run, got '{copy.run / 'model.safetensors'}'" in capsys.readouterr().err


def test_a_log_is_not_continued_and_a_lock_of_a_killed_run_locks_nothing(tmp_path, model_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text(json.dumps({"step": 9, "loss": 9.0}) + "\n")
    (run / folder.LOCK).write_text("process 1 on nowhere")
    assert main(["train", "--config", write_run(tmp_path, model_path)]) == 0
    assert logged(run) == [1, 2, 3] and "metrics.jsonl.before" in capsys.readouterr().err
    assert not (run / folder.LOCK).exists()


def test_resuming_goes_on_to_the_same_end(copy):
    """As if the run had ended after step 2: its later checkpoints are gone, or were cut short while being written."""
    shutil.rmtree(copy.run / "checkpoint-3")
    (copy.run / "checkpoint-4" / "trainer_state.json").unlink()
    (copy.run / "model.safetensors").unlink()
    assert copy.resume("--resume") == 0
    assert (copy.run / "model.safetensors").read_bytes() == copy.weights
    assert logged(copy.run) == [1, 2, 3, 4, 3, 4]


def test_a_finished_run_takes_no_further_step(copy, capsys):
    before = files_of(copy.run)
    assert copy.resume("--resume") == 0
    after = files_of(copy.run) | {"run.yaml": before["run.yaml"]}  # says where this copy lies
    assert logged(copy.run) == [1, 2, 3, 4] and after == before
    assert "checkpoint-4 is the end of the run: no step was left" in capsys.readouterr().out


def test_a_finished_run_in_the_middle_of_an_epoch_takes_none_either(tmp_path, model_path):
    config = write_run(tmp_path, model_path, max_steps=3)  # an epoch has four
    run = tmp_path / "run"
    assert main(["train", "--config", config]) == 0
    before = files_of(run)
    assert main(["train", "--config", config, "--resume"]) == 0
    assert logged(run) == [1, 2, 3] and files_of(run) == before


def test_a_run_can_be_made_longer(copy, capsys):
    assert copy.resume("--resume", "--max_steps", "5") == 0
    assert logged(copy.run) == [1, 2, 3, 4, 5]
    assert "max_steps was 4 and is 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--seed", "7"], "seed was 42 and is 7"),
        (["--tau", "0.5"], "tau was 0.7 and is 0.5"),
        (["--learning_rate", "1e-4"], "learning_rate was 0.001 and is 0.0001"),
        (["--per_device_train_batch_size", "1"], "per_device_train_batch_size was 2 and is 1"),
        (["--rewards", "trainer_rig:digit_count,last_number"], "rewards was ['trainer_rig:digit_count'] and is"),
    ],
)
def test_another_run_is_not_resumed(copy, capsys, flags, sentence):
    before = files_of(copy.run)
    assert copy.resume("--resume", *flags) == 2
    error = capsys.readouterr().err
    assert sentence in error and f"--resume must go on with the settings of {copy.run / 'checkpoint-4'}" in error
    assert "add --resume-anyway" in error and files_of(copy.run) == before


def test_another_run_is_resumed_anyway(copy, capsys):
    assert copy.resume("--resume-anyway", "--max_steps", "5", "--seed", "7", "--tau", "0.5") == 0
    error = capsys.readouterr().err
    assert "seed was 42 and is 7" in error and "tau was 0.7 and is 0.5" in error and logged(copy.run)[-1] == 5


def test_edited_rows_and_other_ranks_are_another_run(copy, capsys, tmp_path, monkeypatch):
    edited = rig.rows()
    edited[3]["answer"] = "9"
    for name, data in (("same", rig.rows()), ("edited", edited)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, data)))
    assert copy.resume("--resume", "--data", str(tmp_path / "same.jsonl")) == 0  # moved, not edited
    assert copy.resume("--resume", "--data", str(tmp_path / "edited.jsonl")) == 2
    assert "the rows of data differ" in capsys.readouterr().err
    monkeypatch.setattr(folder, "RANKS", 2)
    assert copy.resume("--resume") == 2
    assert "its rng_state_0.pth is missing" in capsys.readouterr().err


def test_edited_rows_of_a_table_are_another_run(tmp_path, model_path, capsys):
    """pandas counts a table by its columns; some of its rows are held out."""
    table = {"reader": "pandas:read_json", "eval_data": str(tmp_path / "rows.json"), "eval_rows": 3}
    config = write_run(tmp_path, model_path, max_steps=1, data=rig.rows(), **table)
    flags = ["train", "--config", config, "--data", str(tmp_path / "rows.json")]
    for answer, code in (("1", 0), ("9", 2)):
        (tmp_path / "rows.json").write_text(json.dumps([*rig.rows(), {**rig.rows(1)[0], "answer": answer + "a"}]))
        assert main([*flags, *(["--resume"] if code else [])]) == code
    assert "the rows of data differ" in capsys.readouterr().err


def test_what_is_shown_and_kept_may_change(copy):
    assert copy.resume("--resume", "--logging_steps", "2", "--save_total_limit", "9", "--run_name", "another") == 0


@pytest.mark.parametrize(
    "flags",
    [
        ["--tau", "0.7", "--normalize", "std", "--reduction", "token-mean", "--clip_low", "null", "--data_seed", "null",
         "--model", "./{name}", "--tokenizer", "{model}", "--lr_scheduler_type", "linear", "--adam_beta1", ".9"],
        ["--model", "{model}/", "--tokenizer", "../{parent}/{name}", "--rewards", "trainer_rig:digit_count"],
    ],
    ids=["options and relative paths", "spellings"],
)  # fmt: skip
def test_what_holds_anyway_may_be_said_too(copy, model_path, monkeypatch, capsys, flags):
    monkeypatch.chdir(model_path.parent)
    names = {"model": model_path, "name": model_path.name, "parent": model_path.parent.name}
    assert copy.resume("--resume", *(flag.format(**names) for flag in flags)) == 0, capsys.readouterr().err
    assert "since" not in capsys.readouterr().err


def test_settings_of_a_run_without_manifests_are_those_of_its_run_yaml(copy, capsys):
    for path in copy.run.rglob(MANIFEST):
        path.unlink()
    assert copy.resume("--resume", "--seed", "7") == 2
    assert "seed was 42 and is 7" in capsys.readouterr().err
    assert copy.resume("--resume") == 0
    assert "checkpoint-4 has no manifest: its files are there" in capsys.readouterr().err


# Checkpoints

FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("manifest", [True, False], ids=["with a manifest", "without"])
@pytest.mark.parametrize("damage", [cut, Path.unlink], ids=["cut", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_noticed(copy, name, damage, manifest):
    if not manifest:
        for path in copy.run.rglob(MANIFEST):
            path.unlink()
    damage(copy.run / "checkpoint-4" / name)
    found, (sentence,) = newest_whole(copy.run)
    assert found == copy.run / "checkpoint-3"
    assert sentence.startswith(f"{copy.run / 'checkpoint-4'} is not whole: ")
    assert name in sentence or f"its {name.partition('.')[0]} is missing" in sentence


def test_changed_bytes_and_a_torn_manifest_are_noticed(copy):
    path = copy.run / "checkpoint-4" / "optimizer.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    cut(copy.run / "checkpoint-3" / MANIFEST)
    found, sentences = newest_whole(copy.run)
    assert found == copy.run / "checkpoint-2"
    assert "optimizer.pt is not the file that was saved" in sentences[0] and MANIFEST in sentences[1]


def test_the_mark_of_a_large_file_reads_little_of_it(tmp_path):
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(1 << 36)  # 64 GiB of nothing
    before, start = mark(path), time.perf_counter()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"1")
    assert mark(path) != before and time.perf_counter() - start < 20


def test_the_newest_whole_checkpoint_is_taken_and_the_others_are_named(copy, capsys):
    cut(copy.run / "checkpoint-4" / "trainer_state.json")
    (copy.run / "checkpoint-3" / "optimizer.pt").unlink()
    assert copy.resume("--resume") == 0
    captured = capsys.readouterr()
    assert "checkpoint-4 is not whole: trainer_state.json has" in captured.err
    assert "checkpoint-3 is not whole: optimizer.pt is missing" in captured.err
    assert f"going on from {copy.run / 'checkpoint-2'}" in captured.out
    assert (copy.run / "model.safetensors").read_bytes() == copy.weights
    assert newest_whole(copy.run) == (copy.run / "checkpoint-4", [])  # written anew, whole


def test_without_a_whole_checkpoint_nothing_is_resumed(copy, capsys):
    for checkpoint in copy.run.glob("checkpoint-*"):
        cut(checkpoint / "model.safetensors")
    assert copy.resume("--resume") == 2
    error = capsys.readouterr().err
    assert "--resume must find a whole checkpoint in output_dir" in error and error.count("is not whole") == 4


def test_a_checkpoint_of_the_model_only_needs_a_word(tmp_path, model_path, capsys):
    config = write_run(tmp_path, model_path, save_only_model=True)
    assert main(["train", "--config", config]) == 0
    assert main(["train", "--config", config, "--resume"]) == 2
    assert "its optimizer is missing" in capsys.readouterr().err
    assert main(["train", "--config", config, "--resume-anyway", "--max_steps", "4"]) == 0


# The log


def test_half_a_line_of_the_log_is_left_out_and_not_continued(copy, capsys):
    shutil.rmtree(copy.run / "checkpoint-4")
    metrics = copy.run / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    torn = next(i for i, line in enumerate(lines) if json.loads(line)["step"] == 4)
    metrics.write_text("\n".join([*lines[:torn], lines[torn][:20]]))
    with pytest.warns(UserWarning, match=f"line {torn + 1} was cut short and is left out"):
        assert copy.resume("--resume") == 0
    after = metrics.read_text().splitlines()
    assert after[torn] == lines[torn][:20] and json.loads(after[torn + 1])["step"] == 4
    with pytest.warns(UserWarning, match="was cut short"):
        assert main(["plot", str(copy.run)]) == 0


# Signals and the lock


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(tmp_path, model_path, capsys):
    config = write_run(tmp_path, model_path, max_steps=100_000, save_steps=100_000, log_completions_steps=0)
    process, run = gft(tmp_path / "said", "train", "--config", config), tmp_path / "run"
    wait_for_steps(process, run)
    assert main(["train", "--config", config, "--resume"]) == 2  # meanwhile no other run enters the folder
    holder = f"process {process.pid} on"
    assert f"output_dir must not be in use, got '{run}', in which {holder}" in capsys.readouterr().err
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    error = (tmp_path / "said").read_text()
    assert process.exitcode == 130, error
    assert "finishing this step, then saving" in error and "with --resume" in error
    stopped = int(newest_whole(run)[0].name.partition("-")[2])
    assert stopped >= 3 and not (run / folder.LOCK).exists()
    assert main(["train", "--config", config, "--resume", "--max_steps", str(stopped + 2)]) == 0
    steps = logged(run)
    assert steps[-1] == stopped + 2 and steps.count(stopped + 1) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_signals_that_end_jobs_save_as_ctrl_c_does(tmp_path, model_path, monkeypatch, capsys, number):
    def kills(prompts, completions, **columns):
        os.kill(os.getpid(), number)
        return [float(len(text)) for text in completions]

    monkeypatch.setattr(rig, "kills", kills, raising=False)
    config = write_run(tmp_path, model_path, rewards=["trainer_rig:kills"], max_steps=9, save_steps=9)
    before = signal.signal(number, signal.SIG_DFL)
    try:
        assert main(["train", "--config", config]) == 130
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    error = capsys.readouterr().err
    assert "send the signal again to stop at once" in error and "stopped after step 1; go on from" in error
    assert newest_whole(tmp_path / "run") == (tmp_path / "run" / "checkpoint-1", [])


def test_a_hang_up_of_the_terminal_saves(tmp_path, model_path):
    """The terminal is gone: whatever is printed afterwards fails, and must not keep the step from being saved."""
    config = write_run(
        tmp_path, model_path, max_steps=100_000, save_steps=100_000, log_completions_steps=1, disable_tqdm=False
    )
    ours, theirs = os.openpty()
    process = gft(tmp_path / "unused", "train", "--config", config, terminal=theirs)
    os.close(theirs)
    reading = subprocess.Popen(["cat"], stdin=ours, stdout=subprocess.DEVNULL)
    wait_for_steps(process, tmp_path / "run")
    reading.kill()
    reading.wait()
    os.close(ours)
    process.join(60)
    process.kill()
    assert process.exitcode, "it is there still, or ended as if nothing had been"
    assert newest_whole(tmp_path / "run")[0] is not None


def test_nohup_is_respected_and_signals_are_given_back_when_training_raises(tmp_path):
    def fails(prompts, completions, **columns):
        assert signal.getsignal(signal.SIGTERM) == stop._on_signal
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        raise KeyError("no such answer")

    stop = SaveOnInterrupt()
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.raises(RuntimeError, match="no such answer"):
            rig.trainer(tmp_path, reward_funcs=fails, callbacks=[stop]).train()
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, hang_up)
