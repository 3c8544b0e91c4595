"""Rows and options: what is refused before training begins, and in which words."""

from __future__ import annotations

import math

import datasets
import numpy
import pandas
import pytest
import torch
import trainer_rig as rig
from transformers import Gemma3Config, GPT2Config

from gft_kernels.data.fields import check_record
from gft_kernels.data.rows import Limits, Response, Row
from gft_kernels.trainer import GFTConfig, RowError
from gft_kernels.trainer.groups import Group, collate


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": "a", "text": "b"}, "field `prompt` must be text .* got nothing beside label, text; rename"),
        ({"prompt": 3}, r"field `prompt` must be text .* got int 3"),
        ({"prompt": "  "}, "field `prompt` must be text"),
        ({"prompt": [{"role": "user"}]}, "field `prompt` must be text or a list"),
        ({"prompt": "\ud83d"}, "field `prompt` must be text or a list"),
        ({"prompt": [{"role": "user", "content": "\ud83d"}]}, "field `prompt` must be text or a list"),
        ([1], "must be an object with fields, got list"),
        ({"prompt": "a", 3: "b"}, "the name of a field must be text, got 3"),
        *(
            ({"prompt": "a", name: "b"}, f"field `{name}` must have another name, got one that reward functions get")
            for name in ("completions", "prompts", "completion_ids", "trainer_state", "log_metric")
        ),
        ({"prompt": "a", "demonstrations": "b"}, "field `demonstrations` must be a list of non-empty texts, got str"),
        ({"prompt": "a", "demonstrations": ["b", ""]}, "field `demonstrations` must be a list of non-empty texts"),
        ({"prompt": "a", "demonstrations": ["b", 7]}, "field `demonstrations` must be a list of non-empty texts"),
        ({"prompt": "a", "responses": ["b"]}, "field `rewards` must come together with `responses`"),
        ({"prompt": "a", "responses": ["b"], "rewards": [1, 2]}, "field `rewards` must hold one number per response"),
        ({"prompt": "a", "responses": ["b"], "rewards": ["1"]}, "field `rewards` must be a list of numbers"),
        ({"prompt": "a", "responses": ["b"], "rewards": [float("nan")]}, "field `rewards` must be a list of numbers"),
        ({"prompt": "a", "responses": ["b"], "rewards": [10**400]}, "field `rewards` must be a list of numbers"),
        (
            {"prompt": "a", "responses": ["b", "c"], "rewards": [2**60, 2**60 + 1]},
            r"field `rewards` must be below 2\^53 in size where they are whole, got list \[1152921504606846976, ",
        ),
        ({"prompt": "a", "responses": [], "rewards": []}, "field `responses` must hold at least one response"),
        ({"prompt": "a", "responses": ["b"], "rewards": [1], "demonstrations": ["c"]}, "field .* must be absent"),
    ],
)
def test_a_malformed_row_is_named(row, message):
    with pytest.raises(RowError, match=rf"rows.jsonl, line 3: {message}"):
        check_record(row, "rows.jsonl, line 3")


def changed(index, **fields):
    rows = rig.rows(3)
    rows[index].update(fields)
    return rows


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [(changed(1, demonstrations=["x"]), {}, r"\[1\]: field `demonstrations` must hold at least .* = 2 .* got 1"),
     (changed(2, answer=None), {}, r"train_dataset\[2\]: field `answer` must be given, got nothing; a reward function"),
     (changed(1, demonstrations=["1" * 10, "2"]), {}, r"\[1\]: a response has 11 tokens, max_completion_length is 10"),
     (changed(0, prompt="1" * 9), {"max_prompt_length": 8}, r"\[0\]: field `prompt` has 9 tokens, max_prompt_len"),
     (changed(0, prompt="1" * 60), {}, r"\[0\]: prompt and response reach 70 tokens, the model's context is 64"),
     (changed(1, responses=["a"], rewards=[1.0], demonstrations=None), {}, "`responses` must be given in all rows"),
     (changed(1, prompt=[{"role": "user", "content": "1"}]), {}, "the tokenizer has no chat template"),
     ([{"prompt": "1", "responses": ["1", "2"], "rewards": [1.0, 1e300]}], {"num_generations": 0},
      r"\[0\]: rewards must lie within 1e\+150 of 0, got 1e\+300 at position 1"),
     ([], {}, "must hold at least one usable row, got 0")],
)  # fmt: skip
def test_rows_that_cannot_be_trained_on_are_refused_before_training(tmp_path, rows, options, message):
    with pytest.raises(RowError, match=message):
        rig.trainer(tmp_path, train=rows, **options)


def test_rows_to_evaluate_leave_room_for_samples_where_training_takes_none(tmp_path):
    rows, imitation = changed(0, prompt="1" * 55), {"num_generations": 0, "advantages": "ones"}
    told = r"eval_dataset\[0\]: prompt and response reach 65 tokens, the model's context is 64"
    with pytest.raises(RowError, match=told):
        rig.trainer(tmp_path, train=rows, evaluation=rows, **imitation)


def test_overlong_rows_may_be_dropped(tmp_path):
    trainer = rig.trainer(tmp_path, train=changed(1, demonstrations=["1" * 10, "2"]), overlong="drop")
    assert len(trainer.train_dataset) == 2
    assert trainer.train_dataset[1].where == "train_dataset[2]"


@pytest.mark.parametrize(
    "as_given",
    [
        datasets.Dataset.from_list,
        lambda rows: datasets.Dataset.from_list(rows).with_format("torch"),
        lambda rows: datasets.Dataset.from_list(rows).with_format("numpy"),
        lambda rows: datasets.Dataset.from_list(rows).with_format("pandas"),
        lambda rows: datasets.Dataset.from_list(rows).with_format("arrow"),
        lambda rows: pandas.DataFrame([{**row, "demonstrations": math.nan} for row in rows]),
        pandas.DataFrame,
        lambda rows: [row for _, row in pandas.DataFrame(rows).iterrows()],
        lambda rows: [{**row, "responses": numpy.array(row["responses"])} for row in rows],
        lambda rows: [{**row, "rewards": torch.tensor(row["rewards"])} for row in rows],
        lambda rows: [{**row, "rewards": [numpy.float32(reward) for reward in row["rewards"]]} for row in rows],
        lambda rows: [{**row, "rewards": tuple(row["rewards"])} for row in rows],
    ],
)
def test_rows_of_other_libraries_are_as_good_as_lists(tmp_path, as_given):
    wanted = rig.trainer(tmp_path, train=rig.offline_rows(4), num_generations=0).train_dataset
    found = rig.trainer(tmp_path, train=as_given(rig.offline_rows(4)), num_generations=0).train_dataset
    assert [found[i] for i in range(4)] == [wanted[i] for i in range(4)]
    assert wanted[1].given[1].reward == 0.25 and wanted[1].where == "train_dataset[1]"


def test_messages_may_come_in_arrays():
    """As pandas reads them from a parquet file."""
    row = {"prompt": numpy.array([{"role": "user", "content": "1"}], dtype=object), "answer": numpy.array([1, 2])}
    checked = check_record(row, "a row")
    assert checked["prompt"] == [{"role": "user", "content": "1"}]
    assert checked["answer"] is row["answer"]  # a column of the user's stays what it is


def test_tables_give_every_row_the_fields_of_all():
    row = {
        "prompt": [{"role": "user", "content": "1"}],
        "tools": '[{"name": "a", "parameters": null}]',
        "chat_template_kwargs": {"enable_thinking": False, "effort": None},
    }
    checked = check_record(row, "a row")
    assert checked["tools"] == [{"name": "a"}] and checked["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize("absent", [None, math.nan, numpy.float64("nan"), pandas.NA, pandas.NaT])
def test_what_a_table_leaves_empty_is_absent(tmp_path, absent):
    row = {"prompt": [{"role": "user", "content": "1"}], "answer": "1", "note": absent}
    row |= dict.fromkeys(("demonstrations", "responses", "rewards", "tools", "chat_template_kwargs"), absent)
    checked = check_record(row, "a row")
    assert checked == {**dict.fromkeys(row), **{name: row[name] for name in ("prompt", "answer")}}
    with pytest.raises(RowError, match=r"field `prompt` must be text or .* got nothing"):
        check_record({"prompt": absent}, "a row")
    with pytest.raises(RowError, match=r"train_dataset\[2\]: field `answer` must be given, got nothing; a reward"):
        rig.trainer(tmp_path, train=changed(2, answer=absent))


def test_the_models_limits_are_those_of_its_decoder_of_text(tmp_path):
    nested = Gemma3Config(text_config={"max_position_embeddings": 48, "vocab_size": 20})
    assert Limits.of(nested) == Limits(48, 20) == Limits.of(nested.text_config)
    assert Limits.of(GPT2Config(n_positions=64, vocab_size=7)) == Limits(64, 7)
    assert Limits.of(None) == Limits()
    small = rig.llama()
    small.resize_token_embeddings(8)
    with pytest.raises(RowError, match=r"\[0\]: token ids must be below 8, the rows of the model's embedding"):
        rig.trainer(tmp_path, model=small)


def test_a_prompt_without_a_token_predicts_nothing():
    with pytest.raises(ValueError, match="every prompt must have at least one token, got one of none"):
        collate([Group(Row("", ids, []), [Response("a", [5, 1], "expert")]) for ids in ([], [4, 4])], pad_id=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 1.5}, r"tau must lie in \[0, 1\], got 1.5"),
        ({"tau": "high"}, r"tau must lie in \[0, 1\], got 'high'"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"rectify": "none"}, "rectify must be one of all, positive, bounded, given, got 'none'"),
        ({"reduction": "sum"}, "reduction must be one of token-mean, sequence-mean, got 'sum'"),
        ({"backend": "opencl"}, "backend must be one of auto, .*, got 'opencl'"),
        ({"num_generations": -1}, "num_generations must be a whole number of at least 0, got -1"),
        ({"num_generations": 2.5}, "num_generations must be a whole number of at least 0, got 2.5"),
        ({"advantages": "ones"}, "num_generations must be 0 with advantages 'ones', got 4; imitating"),
        ({"log_kl": True, "token_metrics": False}, "token_metrics must be True with log_kl, got False"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False, got True"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0.0, got 0.1"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices must be True, got False"),
        ({"eval_do_concat_batches": False}, "eval_do_concat_batches must be True, got False; evaluation counts over"),
        ({"prediction_loss_only": True}, "prediction_loss_only must be False, got True; evaluation has a line"),
        ({"include_for_metrics": ["inputs"]}, r"include_for_metrics must be \[\], got \['inputs'\]; evaluation has"),
        ({"bf16_full_eval": True}, r"bf16_full_eval must be False, got True; evaluate\(\) would leave the weights"),
        ({"fp16_full_eval": True}, "fp16_full_eval must be False, got True"),
        ({"objective": "ppo"}, "objective must be one of gft, sft"),
        ({"objective": "grpo", "tau": 0.5}, "tau must be left out with objective='grpo', got 0.5; gft use it"),
        ({"objective": "sft"}, "advantages must be 'ones' with objective 'sft', got 'group'"),
        ({"objective": "dr_grpo", "reduction": "sequence-mean"}, "reduction must be 'token-mean' with objective"),
        ({"given_weight": -1.0}, "given_weight must be 0 or positive and finite, got -1.0"),
        ({"gamma": 0.1}, "gamma must be left out with rectify='all', got 0.1"),
        ({"objective": "sapo", "gate_positive": 0.0}, "gate_positive must be finite and positive, got 0.0"),
        ({"steps_per_rollout": 0}, "steps_per_rollout must be a whole number of at least 1, got 0"),
        ({"num_iterations": 0}, "num_iterations must be a whole number of at least 1, got 0"),
        ({"num_iterations": 2, "dataloader_drop_last": True}, "dataloader_drop_last must be False with num_iterations"),
        ({"num_iterations": 2, "ignore_data_skip": True}, "ignore_data_skip must be False with num_iterations above 1"),
        (
            {"load_best_model_at_end": True, "save_strategy": "no"},
            "eval_strategy must be 'steps' or 'epoch' with load_best_model_at_end, got 'no'; no model is compared",
        ),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "num_demonstrations": 0},
            "num_demonstrations must be at least 1 with load_best_model_at_end, got 0; their loss is",
        ),
        ({"save_strategy": "best"}, "eval_strategy must be 'steps' or 'epoch' with save_strategy 'best'"),
        *(
            (
                {**options, "num_demonstrations": 0},
                "num_demonstrations must be at least 1 with .*given.*, got 0; none is",
            )
            for options in ({"given_objective": "chord"}, {"given_weight": 0.5}, {"rectify": "given"})
        ),
        (
            {"max_resamples": 5},
            "dynamic_sampling must be 'resample' with max_resamples, got None; nothing else samples",
        ),
        (
            {"ref_model_sync_steps": 8},
            "sync_ref_model must be True with ref_model_sync_steps, got False; the copy stays",
        ),
        ({"ref_model_mixup_alpha": 0.5}, "sync_ref_model must be True with ref_model_mixup_alpha, got False"),
        ({"dynamic_sampling": "skip"}, "dynamic_sampling must be one of drop, resample, got 'skip'"),
        ({"dynamic_sampling": "resample", "num_generations": 0}, "num_generations must be at least 1 with dynamic_s"),
        ({"dynamic_sampling": "drop", "given_objective": "chord"}, "given_objective must weigh by an advantage with"),
        ({"curriculum": True, "num_demonstrations": 0}, "num_demonstrations must be at least 1 with curriculum, got 0"),
        ({"top_entropy_quantile": 0.0}, "top_entropy_quantile must lie above 0 and at most at 1, got 0.0"),
        ({"top_entropy_quantile": 0.5, "advantages": "ones", "num_generations": 0}, "advantages must be 'group' with "),
        ({"top_p": 0.0}, "top_p must lie above 0 and at most at 1, got 0.0"),
        ({"top_p": 1.1}, "top_p must lie above 0 and at most at 1, got 1.1"),
        ({"top_k": -1}, "top_k must be a whole number of at least 0, got -1"),
        ({"min_p": 2}, r"min_p must lie in \[0, 1\], got 2"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive and finite, got 0.0"),
        ({"stop_strings": "."}, "stop_strings must be a list of texts that are not empty, got '.'"),
        ({"stop_strings": [""]}, r"stop_strings must be a list of texts that are not empty, got \[''\]"),
        ({"delta": 1.2, "objective": "grpo"}, r"delta must be finite and above 1 \+ clip_high = 1.2, got 1.2"),
        ({"kl_estimator": "mse", "beta": 0.1}, "kl_estimator must be one of k1, k2, k3, got 'mse'"),
        ({"kl_cap": 0.0, "beta": 0.1}, "kl_cap must be finite and positive, got 0.0"),
        ({"imitation": 0.5}, "imitation must be 1.0 with normalize 'std', got 0.5; only 'split'"),
        ({"normalize": "split", "imitation": -1.0}, "imitation must be 0 or positive and finite, got -1.0"),
        *(
            ({"reward_weights": value}, "reward_weights must be a list of finite numbers of float32, got ")
            for value in ([1.0, math.nan], [math.inf], [10**400], ["1"], [True], 1.0)
        ),
        *(
            ({"share_prompts": value}, "share_prompts must be True, False or 'auto', got ")
            for value in ("always", 1, None)
        ),
        *(
            ({"eval_temperature": value}, r"eval_temperature must be 0 \(greedy\) or positive and finite, or a list")
            for value in (-0.5, [], [0.0, 0.0], [1.0, "0"], [True])
        ),
        ({"sync_ref_model": True}, "beta must be above 0 with sync_ref_model, got 0.0; nothing else reads the copy"),
        ({"ref_model_mixup_alpha": 1.5}, "ref_model_mixup_alpha must lie above 0 and at most at 1, got 1.5"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy must be 'random' or 'sequential'"),
    ],
)
def test_options_out_of_range_or_in_conflict_are_refused(tmp_path, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        GFTConfig(output_dir=str(tmp_path), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"reward_funcs": ()}, r"reward_funcs \(a configuration's `rewards`\) must hold at least one function, got none"),
     ({"model": rig.llama().requires_grad_(False)}, "model must have a weight to train, got none that requires grad"),
     ({"num_demonstrations": 0, "num_generations": 0}, "must be at least 1, got 0; a group would be empty"),
     ({"train": rig.offline_rows()}, "num_generations must be 0 where rows bring `responses` and `rewards`, got 2"),
     ({"train": rig.offline_rows(), "normalize": "split", "num_generations": 0}, "must not be 'split' where rows"),
     ({"dataloader_drop_last": True, "per_device_train_batch_size": 9},
      "dataloader_drop_last must be False with 8 rows, fewer than the 9 prompts of a micro-batch over 1 ranks, got "),
     ({"train": "rows.jsonl"}, "train_dataset must be a list of rows or a datasets.Dataset, got str")],
)  # fmt: skip
def test_rows_and_options_that_contradict_each_other_are_refused(tmp_path, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        rig.trainer(tmp_path, **options)
