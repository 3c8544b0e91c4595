"""`gft init` and `gft train --help`: every key once, with the default it has, in a file that trains as it stands."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re

import pytest
import trainer_rig as rig
import yaml

from gft_kernels.cli import completing, main
from gft_kernels.cli.keys import TRAINING, sections
from gft_kernels.cli.settings import UNREAD, RunSettings, load
from gft_kernels.trainer import GFTConfig

pytestmark = pytest.mark.usefixtures("undrawn")

KEYS = [key for keys in sections().values() for key in keys]
OFFLINE = {"prompt": "2 + 3 =", "responses": ["5", "6"], "rewards": [1.0, 0.0]}
GIVEN = {"prompt": "2 + 3 =", "demonstrations": ["5", "ab ab 5", "ba"], "answer": "5"}


def test_every_key_is_listed_once_with_its_default(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    listed = re.findall(r"^  --(\w+) \S+  \[(.*)\]\n      (\S.*)$", shown, re.MULTILINE)
    fields = [f for f in dataclasses.fields(GFTConfig) if f.init and f.name not in UNREAD]
    assert sorted(name for name, *_ in listed) == sorted(f.name for f in [*fields, *dataclasses.fields(RunSettings)])
    defaults = {name: yaml.safe_load(default) for name, default, _ in listed}
    for field in fields:
        if field.default is not dataclasses.MISSING:
            assert defaults[field.name] == getattr(field.default, "value", field.default), field.name
    assert "\nLoss:\n  --objective str  [gft]\n" in shown and "rectify" not in shown[shown.index("\nTraining:") :]


def test_a_shell_can_complete_every_key():
    shown = completing().parse_args(["train", "--config", "a", "--data", "b", "--tau", "0.5", "--max_steps", "3"])
    assert (shown.tau, shown.max_steps, shown.data) == ("0.5", "3", "b")
    assert set(vars(shown)) >= {key.name for key in KEYS}


def start(tmp_path, row, model, *flags) -> str:
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for _ in range(3)))
    out = str(tmp_path / "gft.yaml")
    assert main(["init", str(tmp_path / "rows.jsonl"), "--model", str(model), "--out", out, *flags]) == 0
    return out


def test_the_file_trains_as_it_stands(tmp_path, model_path, capsys):
    out = start(tmp_path, GIVEN, model_path)
    assert f"gft train --config {out} --dry-run" in capsys.readouterr().out
    settings, options = load(out, [], None)
    assert settings.rewards == ["last_number"] and options["num_demonstrations"] == 3
    assert options["learning_rate"] == 1e-5
    longest = len(rig.tokenizer()("ab ab 5")["input_ids"]) + 1
    assert options["max_completion_length"] >= longest and options["max_completion_length"] % 32 == 0
    changes = ["--max_steps", "1", "--use_cpu", "true", "--output_dir", str(tmp_path / "run"), "--disable_tqdm", "true"]
    assert main(["train", "--config", out, *changes]) == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "row, expected",
    [
        (OFFLINE, {"num_generations": 0, "rewards": None}),
        (GIVEN | {"responses": None, "rewards": None}, {"num_generations": 4, "rewards": ["last_number"]}),
        (GIVEN | {"demonstrations": ["\\boxed{5}"]}, {"rewards": ["boxed_answer"], "num_demonstrations": 1}),
        (GIVEN | {"demonstrations": ['{"a": 5}', "x"], "answer": {"a": 5}}, {"rewards": ["json_answer"]}),
        (GIVEN | {"demonstrations": ["2024-05-03", "x"], "answer": "2024-05-03"}, {"rewards": ["exact_answer"]}),
        (GIVEN | {"demonstrations": ["It is Paris."], "answer": "Paris"}, {"rewards": ["rewards_of_mine:reward"]}),
        (
            GIVEN | {"demonstrations": ["On 2024-05-03"], "answer": "2024-05-03"},
            {"rewards": ["rewards_of_mine:reward"]},
        ),
        (GIVEN | {"answer": "#### $5"}, {"rewards": ["last_number"]}),
        (GIVEN | {"answer": "1,5"}, {"rewards": ["rewards_of_mine:reward"]}),
        (
            GIVEN | {"demonstrations": ["1" * 40, "<pad>" * 10]},
            {"rewards": ["last_number"], "max_completion_length": 64},
        ),
        ({"prompt": "2", "completion": "5"}, {"rewards": ["rewards_of_mine:reward"], "num_demonstrations": 0}),
    ],
    ids=[
        "offline",
        "a table's empty fields",
        "boxed",
        "json",
        "text",
        "in words",
        "a date",
        "number",
        "two numbers",
        "tokens",
        "prompts",
    ],
)
def test_the_rows_decide(tmp_path, model_path, row, expected, capsys):
    settings, options = load(start(tmp_path, row, model_path), [], None)
    for name, value in expected.items():
        assert {**vars(settings), **options}[name] == value, name
    shown = capsys.readouterr().out
    assert ("rewards_of_mine.py" in shown) == (expected["rewards"] == ["rewards_of_mine:reward"])
    assert ("not every row has `demonstrations`" in shown) == (expected.get("num_demonstrations") == 0)


@pytest.mark.pretrained
def test_the_tokenizer_of_a_ready_model_says_how_long_responses_are(tmp_path):
    assert load(start(tmp_path, GIVEN, "smollm2"), [], None)[1]["max_completion_length"] == 32


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_an_adapter_is_asked_for_by_a_flag(tmp_path, model_path, capsys):
    out = start(tmp_path, GIVEN, model_path, "--lora")
    assert load(out, [], None)[1]["learning_rate"] == 1e-4
    assert main(["train", "--config", out, "--use_cpu", "true", "--dry-run"]) == 0
    assert "M of them trained" in capsys.readouterr().out


def test_what_is_commented_out_is_the_default(tmp_path, model_path):
    out = start(tmp_path, GIVEN, model_path)
    text = (tmp_path / "gft.yaml").read_text()
    (tmp_path / "gft.yaml").write_text(re.sub(r"^# (\w+: )", r"\1", text, flags=re.MULTILINE))
    settings, options = load(out, [], None)
    given = {**vars(settings), **options}
    assert set(given) >= {key.name for keys in list(sections().values())[:-1] for key in keys}
    assert list(sections())[-1] == TRAINING
    for key in KEYS:
        if re.search(rf"^# {key.name}: ", text, re.MULTILINE):
            assert given[key.name] == yaml.safe_load(key.default), key.name


def test_a_long_name_stays_whole(tmp_path, model_path):
    folder = tmp_path / " ".join(["a folder with a long name"] * 5)
    folder.mkdir()
    settings, _ = load(start(folder, GIVEN, model_path), [], None)
    assert settings.data == str(folder / "rows.jsonl")


def test_no_file_is_written_over(tmp_path, model_path, capsys):
    out = start(tmp_path, GIVEN, model_path)
    before = (tmp_path / "gft.yaml").read_bytes()
    assert main(["init", str(tmp_path / "rows.jsonl"), "--model", str(model_path), "--out", out]) == 2
    assert f"--out must be a new file, got {out!r}, which exists; name another." in capsys.readouterr().err
    assert (tmp_path / "gft.yaml").read_bytes() == before
