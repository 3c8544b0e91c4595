"""Rows and options: what is refused before training begins, and in which words."""

from __future__ import annotations

import json

import datasets
import pytest
import trainer_rig as rig

from gft_kernels.data import gsm8k
from gft_kernels.data.fields import check_record
from gft_kernels.data.text import encode_prompt
from gft_kernels.trainer import GFTConfig, RowError, read_records


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "field `prompt` must be text or a list of {role, content} messages, got nothing"),
        ({"prompt": 3}, r"field `prompt` must be text .* got int 3"),
        ({"prompt": "  "}, "field `prompt` must be text"),
        ({"prompt": [{"role": "user"}]}, "field `prompt` must be text or a list"),
        (
            {"prompt": "a", "demonstrations": "b"},
            "field `demonstrations` must be a list of non-empty texts, got str 'b'",
        ),
        ({"prompt": "a", "demonstrations": ["b", ""]}, "field `demonstrations` must be a list of non-empty texts"),
        ({"prompt": "a", "demonstrations": ["b", 7]}, "field `demonstrations` must be a list of non-empty texts"),
        ({"prompt": "a", "responses": ["b"]}, "field `rewards` must come together with `responses`"),
        ({"prompt": "a", "responses": ["b"], "rewards": [1, 2]}, "field `rewards` must hold one number per response"),
        ({"prompt": "a", "responses": ["b"], "rewards": ["1"]}, "field `rewards` must be a list of numbers"),
        ({"prompt": "a", "responses": ["b"], "rewards": [float("nan")]}, "field `rewards` must be a list of numbers"),
        ({"prompt": "a", "responses": [], "rewards": []}, "field `responses` must hold at least one response"),
        (
            {"prompt": "a", "responses": ["b"], "rewards": [1], "demonstrations": ["c"]},
            "field `demonstrations` must be abs",
        ),
    ],
)
def test_a_malformed_row_is_named(row, message):
    with pytest.raises(RowError, match=rf"rows.jsonl, line 3: {message}"):
        check_record(row, "rows.jsonl, line 3")


def test_files_of_each_kind_know_their_lines(tmp_path):
    rows = rig.rows(3)
    (tmp_path / "a.jsonl").write_text("\n" + "\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    for name, unit, last in (("a.jsonl", "line", 4), ("a.json", "item", 3), ("a.parquet", "row", 3)):
        records = read_records(tmp_path / name)
        assert records == rows
        assert records[2].where == f"{tmp_path / name}, {unit} {last}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"prompt":', "a.jsonl, line 2: must be one JSON object"),
        ("[1]", "a.jsonl, line 1: must be an object"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, text, message):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(RowError, match=message):
        read_records(tmp_path / "a.jsonl")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("prompt\n")
    with pytest.raises(ValueError, match=r"must be a \.jsonl, \.json or \.parquet file, got"):
        read_records(tmp_path / "a.csv")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        read_records(tmp_path / "b.jsonl")


def changed(index, **fields):
    rows = rig.rows(3)
    rows[index].update(fields)
    return rows


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            changed(1, demonstrations=["x"]),
            {},
            r"train_dataset\[1\]: field `demonstrations` must hold at least .* = 2 .* got 1",
        ),
        (
            changed(2, answer=None),
            {},
            r"train_dataset\[2\]: field `answer` must be given, got nothing; a reward function",
        ),
        (
            changed(1, demonstrations=["1" * 10, "2"]),
            {},
            r"\[1\]: a response has 11 tokens, max_completion_length is 10",
        ),
        (
            changed(0, prompt="1" * 9),
            {"max_prompt_length": 8},
            r"\[0\]: field `prompt` has 9 tokens, max_prompt_length is 8",
        ),
        (changed(0, prompt="1" * 60), {}, r"\[0\]: prompt and response reach 70 tokens, the model's context is 64"),
        (
            changed(1, responses=["a"], rewards=[1.0], demonstrations=None),
            {},
            "`responses` must be given in all rows or in none",
        ),
        (changed(1, prompt=[{"role": "user", "content": "1"}]), {}, "the tokenizer has no chat template"),
        ([], {}, "must hold at least one usable row, got 0"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused_before_training(tmp_path, rows, options, message):
    with pytest.raises(RowError, match=message):
        rig.trainer(tmp_path, train=rows, **options)


def test_overlong_rows_may_be_dropped(tmp_path):
    trainer = rig.trainer(tmp_path, train=changed(1, demonstrations=["1" * 10, "2"]), overlong="drop")
    assert len(trainer.train_dataset) == 2
    assert trainer.train_dataset[1].where == "train_dataset[2]"


def test_a_dataset_serves_as_well_as_a_list(tmp_path):
    trainer = rig.trainer(tmp_path, train=datasets.Dataset.from_list(rig.rows(4)))
    trainer.train()
    assert trainer.state.global_step == 2


def test_messages_go_through_the_chat_template():
    tokenizer = rig.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}#{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    assert encode_prompt(tokenizer, [{"role": "user", "content": "12"}]) == tokenizer("12#>")["input_ids"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 1.5}, r"tau must lie in \[0, 1\], got 1.5"),
        ({"tau": "high"}, r"tau must lie in \[0, 1\], got 'high'"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"rectify": "none"}, "rectify must be one of all, positive, got 'none'"),
        ({"reduction": "sum"}, "reduction must be one of 'token-mean', 'sequence-mean', got 'sum'"),
        ({"backend": "opencl"}, "backend must be one of 'auto', .*, got 'opencl'"),
        ({"num_generations": -1}, "num_generations must be a whole number of at least 0, got -1"),
        ({"num_generations": 2.5}, "num_generations must be a whole number of at least 0, got 2.5"),
        ({"advantages": "ones"}, "num_generations must be 0 when advantages is 'ones', got 4"),
        ({"log_kl": True, "token_metrics": False}, "token_metrics must be True when log_kl is, got False"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False, got True"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0.0, got 0.1"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices must be True, got False"),
        ({"objective": "ppo"}, "objective must be one of 'gft', 'sft'"),
        ({"objective": "grpo", "tau": 0.5}, "tau must be left out with objective='grpo', got 0.5; gft use it"),
        ({"objective": "dft", "clip_high": 0.3}, "clip_high must be left out with objective='dft'"),
        ({"objective": "cispo", "clip_low": 0.3}, "clip_low must be left out with objective='cispo'"),
        ({"clip_low": 0.2}, "clip_low must be left out with objective='gft', got 0.2"),
        ({"objective": "sft"}, "advantages must be 'ones' with objective 'sft', got 'group'"),
        ({"objective": "dr_grpo", "reduction": "sequence-mean"}, "reduction must be 'token-mean' with objective"),
        ({"objective": "dapo", "clip_high": -0.1}, "clip_high must be 0 or positive and finite, got -0.1"),
        ({"beta": "much"}, "beta must be 0 or positive and finite, got 'much'"),
        ({"steps_per_rollout": 0}, "steps_per_rollout must be a whole number of at least 1, got 0"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy must be 'random' or 'sequential'"),
    ],
)
def test_options_out_of_range_or_in_conflict_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        GFTConfig(output_dir=str(tmp_path), **options)


def test_an_unknown_option_is_refused(tmp_path):
    with pytest.raises(TypeError, match="taw"):
        GFTConfig(output_dir=str(tmp_path), taw=0.5)


@pytest.mark.parametrize(
    ("train", "options", "message"),
    [
        (rig.rows(), {"reward_funcs": ()}, "reward_funcs must hold at least one function"),
        (
            rig.rows(),
            {"num_demonstrations": 0, "num_generations": 0},
            "must be at least 1, got 0; a group would be empty",
        ),
        (rig.offline_rows(), {}, "num_generations must be 0 where rows bring `responses` and `rewards`, got 2"),
        ("rows.jsonl", {}, "train_dataset must be a list of rows or a datasets.Dataset, got str"),
    ],
)
def test_rows_and_options_that_contradict_each_other_are_refused(tmp_path, train, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        rig.trainer(tmp_path, train=train, **options)


def test_gsm8k_parquet_files_become_rows(tmp_path):
    main = [{"question": f"q{i}", "answer": f"1+{i} = <<1+{i}=9>>9\n#### {i}"} for i in range(3)]
    socratic = [{"question": f"q{i}", "answer": f"How? ** {i}\n#### {i}"} for i in (2, 1, 0)]
    datasets.Dataset.from_list(main).to_parquet(tmp_path / "train.parquet")
    assert [len(r["demonstrations"]) for r in gsm8k.read_rows(tmp_path)] == [1, 1, 1]
    (tmp_path / "socratic").mkdir()
    datasets.Dataset.from_list(socratic).to_parquet(tmp_path / "socratic" / "train.parquet")
    rows = gsm8k.read_rows(tmp_path)
    assert rows[2]["demonstrations"] == ["1+2 = 9\n#### 2", "How? ** 2\n#### 2"] and rows[2]["answer"] == "2"
    assert rows[2].where == f"{tmp_path / 'train.parquet'}, row 3"
    datasets.Dataset.from_list([{"question": "q0", "answer": "nine"}]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(RowError, match=r"train.parquet, row 1: field `answer` must end in a line '#### <number>'"):
        gsm8k.read_rows(tmp_path)
