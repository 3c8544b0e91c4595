"""`gft train --dry-run`: columns, batches and memory of the paper's preset without GPU, checkpoint or tokenizer."""

from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest
import torch
import trainer_rig as rig
from cli_rig import ROOT, write_run
from transformers import AutoModelForCausalLM

from gft_kernels.cli import activations, forecast, main
from gft_kernels.cli.dry_run import Unread
from gft_kernels.trainer import GFTConfig

PRESET = str(ROOT / "examples" / "numina_qwen2.5_math_1.5b.yaml")
QWEN = 1_543_714_304  # parameters of Qwen2.5-1.5B, tied


def numina(**changes) -> dict:
    """A row in the columns of the paper's data."""
    row = {
        "prompt": [{"role": "user", "content": "What is 1 + 1?"}],
        "reward_model": {"style": "rule", "ground_truth": "2"},
        "extra_info": {"answer": "It is \\boxed{2}.", "model_answer": ["\\boxed{2}", "1 + 1 = 2", "two"]},
    }
    for name, value in changes.items():
        top, _, field = name.partition("__")
        row[top] = {**row[top], field: value} if field else value
    return row


@pytest.fixture
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)  # the preset names the configuration beside it


def test_the_papers_preset(tmp_path, in_the_repository, capsys):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([numina()] * 1000), tmp_path / "train.parquet")
    assert main(["train", "--config", PRESET, "--data", str(tmp_path), "--dry-run", "--ranks", "8"]) == 0
    shown = capsys.readouterr().out
    for expected in (
        "gft, tau 0.7, rectify all",
        "1000 of 1000 rows, columns checked; lengths not checked: the tokenizer is not on disk",
        "8 responses a prompt, 4 of them sampled",
        "8 ranks × 2 prompts × 2 micro-batches = 32 prompts, 256 responses",
        "4 steps = 128 prompts, 512 responses sampled; 16 prompts a rank",
        "32 steps an epoch, 32 steps in all",  # 1000 / 32, the last one partial
        "Qwen/Qwen2.5-Math-1.5B is not on disk: its numbers are those of examples/configs/qwen2.5_math_1.5b.json",
        "1.54 G parameters",
    ):
        assert expected in shown, expected
    listed = [line for line in shown.splitlines() if line.startswith("  ")]
    memory = {line.split()[0]: float(line.removeprefix("  in").split()[1]) for line in listed}
    parts = [float(line.split()[1]) for line in listed if line.startswith("  and")]
    assert memory["in"] == pytest.approx(memory["DDP"] + sum(parts), abs=0.03)
    gib = 2**30
    assert memory["DDP"] == pytest.approx(QWEN * (4 + 4 + 8) / gib, abs=0.01)
    assert memory["ZeRO-2"] == pytest.approx(QWEN * (2 + 2 / 8 + 12 / 8) / gib, abs=0.01)
    assert memory["FSDP2"] == pytest.approx(QWEN * 16 / 8 / gib, abs=0.01)
    assert memory["ZeRO-3"] == pytest.approx(QWEN * (4 + 12) / 8 / gib, abs=0.01)
    assert memory["instead"] == pytest.approx(2 * 4 * 16 * 2048 * 151936 / gib, abs=0.01)  # 2 prompts of 8 responses
    cache = 64 * (1024 + 2048) * 2 * 28 * 2 * 128 * 2  # responses, tokens, K and V, layers, heads, head, bfloat16
    assert f"{cache / gib:8.2f}  KV cache of a rollout" in shown
    assert not list(tmp_path.glob("**/metrics.jsonl")) and not (ROOT / "runs" / "numina").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "What?"}, "row 2: field `prompt` must be a list of {role, content} messages, got 'What?'"),
        ({"reward_model__style": "model"}, "row 2: field `reward_model.style` must be 'rule'"),
        ({"reward_model__ground_truth": " "}, "row 2: field `reward_model.ground_truth` must be given"),
        ({"extra_info__answer": None}, "row 2: field `extra_info.answer` must be the expert's solution, got None"),
        ({"extra_info__model_answer": "two"}, "row 2: field `extra_info.model_answer` must be a list of"),
        ({"extra_info__model_answer": ["two"]}, "field `demonstrations` must hold at least num_demonstrations = 4"),
    ],
)
def test_a_wrong_column_is_named(tmp_path, in_the_repository, capsys, row, message):
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, [numina(), numina(**row)])))
    assert main(["train", "--config", PRESET, "--data", str(data), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert message.replace("row 2", f"{data}, line 2") in error and "Traceback" not in error


def test_what_is_on_disk_is_read(tmp_path, model_path, capsys):
    config = write_run(tmp_path, model_path, rig.rows(10), beta=0.1, overlong="drop", max_prompt_length=4)
    assert main(["train", "--config", config, "--dry-run", "--ranks", "2"]) == 0
    shown = capsys.readouterr().out
    assert "5 of 10 rows, columns checked; longest prompt 4 tokens, response 7 of 10" in shown  # the even ones have 8
    assert "2 ranks × 2 prompts × 1 micro-batches = 4 prompts" in shown and "3 steps in all" in shown
    assert "copy of the starting weights" in shown and "not on disk" not in shown
    assert "activations at most: responses of full length, no prompt shared" in shown
    assert not (tmp_path / "run").exists()


def test_held_out_rows_are_checked_too(tmp_path, model_path, capsys):
    config, held_out = write_run(tmp_path, model_path, rig.rows(10)), tmp_path / "held-out.jsonl"
    held_out.write_text(json.dumps(rig.rows(1)[0]))
    asked = ["train", "--config", config, "--eval_data", str(held_out), "--dry-run"]
    assert main(asked) == 0 and "1 of 1 rows, columns checked" in capsys.readouterr().out
    held_out.write_text('{"prompt": 3}')
    assert main(asked) == 2 and f"{held_out}, line 1: field `prompt` must be" in capsys.readouterr().err


def test_demonstrations_are_rewarded(tmp_path, model_path, capsys, monkeypatch):
    asked, rows = ["train", "--config", write_run(tmp_path, model_path, rig.rows(10)), "--dry-run"], rig.rows(10)
    expert, teacher = (
        sum(rig.digit_count([], [row["demonstrations"][i] for row in rows], [row["answer"] for row in rows])) / 10
        for i in (0, 1)
    )
    assert main(asked) == 0 and expert != teacher
    assert f"rewards      expert {expert:.3g}, teacher {teacher:.3g} on average, of d" in capsys.readouterr().out
    (tmp_path / "divides.py").write_text("def reward(completions, **columns):\n    return 1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main([*asked, "--rewards", "divides:reward"]) == 2
    assert "reward function reward raised ZeroDivisionError" in capsys.readouterr().err


def test_without_any_configuration_there_is_no_estimate(tmp_path, model_path, capsys):
    config = write_run(tmp_path, model_path, rig.rows(10), model="nobody/nothing")
    assert main(["train", "--config", config, "--dry-run"]) == 0
    assert "nobody/nothing is not on disk and model_config is not given: no estimate" in capsys.readouterr().out
    assert main(["train", "--config", config, "--dry-run", "--model_config", "nowhere.json"]) == 2
    assert "model_config must be a config.json, got 'nowhere.json'" in capsys.readouterr().err


def test_what_training_would_refuse_the_dry_run_refuses(tmp_path, model_path, capsys):
    config = write_run(tmp_path, model_path, rig.rows(10))
    for flags, message in (
        (["--tau", "2"], "tau must lie in [0, 1]"),
        (["--num_demonstrations", "9"], "must hold at least num_demonstrations = 9 texts, got 2"),
        (["--max_completion_length", "2"], "max_completion_length is 2; raise it"),
        (["--dataloader_drop_last", "true", "--ranks", "6"], "10 rows, fewer than the 12 prompts of a micro"),
        (["--eval_strategy", "steps"], "eval_data must be given where eval_on_start or eval_strategy asks"),
        (["--rollout_fn", "gft_kernels:absent"], "module gft_kernels has no 'absent'"),
        (["--ranks", "0"], "--ranks must be at least 1"),
    ):
        assert main(["train", "--config", config, "--dry-run", *flags]) == 2
        assert message in capsys.readouterr().err
    assert main(["train", "--config", config, "--ranks", "2"]) == 2  # only a dry run can be told


def test_the_plan_counts_the_steps_the_trainer_takes(tmp_path):
    """Epochs, a partial last step and places without a row: the trainer's own count."""
    for rows, micro, accumulation, drops in ((11, 2, 2, False), (8, 2, 4, False), (3, 4, 1, False), (9, 2, 2, True)):
        trainer = rig.trainer(
            tmp_path, train=rig.rows(rows), per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation,
            max_steps=-1, num_train_epochs=2, num_generations=0, learning_rate=0.0, dataloader_drop_last=drops,
        )  # fmt: skip
        trainer.train()
        assert forecast.batches(trainer.args, rows, 1, 2).steps == trainer.state.global_step


def test_the_shape_is_that_of_the_model():
    model = rig.llama()
    shape = forecast.shape_of(model.config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert (shape.vocabulary, shape.hidden, shape.layers, shape.kv_heads, shape.head_dim) == (20, 32, 1, 2, 16)
    assert Unread()("any text") == {"input_ids": [0]}
    assert GFTConfig(output_dir="x").steps_per_rollout == 1


@pytest.mark.parametrize("family", [rig.llama, rig.gpt2], ids=["llama", "gpt2"])
def test_what_layers_keep_is_counted_without_memory(family):
    """Beside what real tensors keep in this model's forward, for twice the depth and another length."""
    config = family(**({"dropout": 0.0} if family is rig.gpt2 else {})).config
    beside, layer = activations.saved_by_token(config, autocast=False)
    config.get_text_config().num_hidden_layers = 4
    model = AutoModelForCausalLM.from_config(config).train()
    kept, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    ids = torch.ones(1, 48, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    real = sum(storage.nbytes() for place, storage in kept.items() if place not in own)
    assert 48 * (beside + 4 * layer) == pytest.approx(real, rel=0.25)
    del output
    args = rig.config("x", gradient_checkpointing=True)
    shape, found = forecast.shape_of(config), forecast.batches(args, 10, 1, 4)
    checkpointed = activations.activation_memory(args, config, shape, found, 8)
    assert checkpointed == found.rows_per_micro_batch * 18 * (beside + layer + 4 * 32 * 4)
    args.gradient_checkpointing = False
    assert activations.activation_memory(args, config, shape, found, 8) > 1.5 * checkpointed
