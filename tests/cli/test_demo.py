"""`gft demo`: what it trains, what its last screen says, and that it is the run of the examples."""

from __future__ import annotations

import json
import runpy

import chat_tokenizers
import pytest
import yaml
from cli_rig import ROOT

from gft_kernels.cli import demo, extraction_demo, held_out, main
from gft_kernels.data import pretrained


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return chat_tokenizers.model_folder(tmp_path_factory.mktemp("chat"))


def test_one_screen_says_what_was_learnt(chat_model, tmp_path, capfd):
    tiny = {"max_steps": 2, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 5}
    result = extraction_demo.run(tmp_path, "json", chat_model, seed=3, max_completion_length=80, **tiny)
    shown, noise = capfd.readouterr()
    assert noise == "" and "\r" not in shown and "{'" not in shown
    assert shown.count("GFT step") == shown.count("SFT step") == 2 and shown.count(" left") == 3 + 2 + 2
    expected = ("tiny, 0.0 M parameters, learns to write name, age", "among 5 held-out rows", "after 2 steps", "before")
    for words in (*expected, *held_out.TEMPERATURES, *held_out.CLAIMS, *(line[:40] for line in result["asked"])):
        assert words in shown, words
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert (tmp_path / "held-out.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "gft" / "model.safetensors").is_file()
    for found in (result["before"], *result["methods"].values()):
        assert len(found["completions"]) == 3 and set(found["right"]) == set(held_out.TEMPERATURES)
    assert result["methods"]["sft"]["sampling_a_step"] == 0 < result["methods"]["gft"]["sampling_a_step"]


@pytest.mark.parametrize("task", ["json", "dates"])
def test_the_demo_is_the_examples_run(task):
    rows, reward, _ = extraction_demo.TASKS[task]
    file = f"{rows.__name__.rpartition('.')[2]}.yaml"
    example = yaml.safe_load((ROOT / "examples" / file).read_text())
    expected = {**extraction_demo.SHARED, **extraction_demo.METHODS["gft"], "model": "smollm2", "rewards": [reward]}
    expected |= {"reader": f"{rows.__name__}:read_rows", "data": "sample", "eval_data": "sample"}
    expected["eval_on_start"] = True
    # what the demo writes and shows is its own
    expected = {key: value for key, value in expected.items() if key != "log_completions_steps"}
    assert {key: value for key, value in example.items() if key != "output_dir"} == {
        **expected, "learning_rate": "3e-5"  # YAML's spelling, which gft train reads as a number
    }  # fmt: skip
    assert float(example["learning_rate"]) == extraction_demo.SHARED["learning_rate"]


def test_the_example_trains_an_adapter(chat_model, tmp_path, capsys, monkeypatch):
    tiny = ["--model", chat_model, "--steps", "1", "--held-out", "3", "--longest", "80", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["extract_lora.py", *tiny])
    runpy.run_path(str(ROOT / "examples" / "extract_lora.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert "T = 1: 0.00 right before, 0.00 after 1 steps" in shown and "greedy: 0.00 right before" in shown
    assert (tmp_path / "adapter_model.safetensors").is_file() and not (tmp_path / "model.safetensors").exists()


def test_an_interval_is_wilsons():
    assert held_out.interval(0.5, 64) == pytest.approx((0.3810, 0.6190), abs=1e-4)
    assert held_out.interval(0.0, 64)[0] == pytest.approx(0.0, abs=1e-12)
    assert held_out.interval(1.0, 64) == pytest.approx((0.9434, 1.0), abs=1e-4)


def test_the_time_left_is_told_from_the_parts_done(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    remaining = extraction_demo.Remaining(total=100)
    now[0] = 60.0
    assert remaining.after(20) == "about 4 min left"
    now[0] = 120.0
    assert remaining.after(60) == "about 30 s left"


def test_what_the_demo_cannot_do_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(pretrained.READY, "absent", pretrained.Carried("no_such_module", "*.gguf", "pip install it"))
    notes, left = tmp_path / "dates" / "notes.txt", tmp_path / "dates" / "gft" / "metrics.jsonl"
    for file in (notes, left):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    for flags, message in (
        (["--model", "absent"], "model must be installed, got 'absent', which is not; run pip install it"),
        (["--quick", "--seed", "1"], "--seed must go with --only dates or json, got digit-sum; leave it out."),
        (["--data", "x"], "--data must go with --only gsm8k, got dates; leave it out."),
    ):
        assert main(["demo", "--out", str(tmp_path), *flags]) == 2
        assert f"gft demo: {message}" in capsys.readouterr().err
    assert notes.exists() and not left.exists()  # what an earlier demo left goes, nothing else
    assert set(demo.TAKES) == {"json", "dates", "digit-sum", "gsm8k"}
