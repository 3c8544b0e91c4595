"""`register` in the installed ms-swift: its hooks as expected, settings checked, and steps equal to the formula's."""

from __future__ import annotations

import dataclasses
import inspect
from types import SimpleNamespace

import pytest

pytest.importorskip("swift.trainers", reason="ms-swift is not installed here: pip install ms-swift==4.6.0")

import host_ranks
import host_rig
from swift import SftArguments, sft_main
from swift.callbacks import callbacks_map
from swift.template import TEMPLATE_MAPPING, TemplateMeta, register_template
from swift.template.base import Template
from swift.trainers import Seq2SeqTrainer

from gft_kernels.integrations.swift import check_settings, message_rows, register


def command_line(folder) -> list[str]:
    """`swift sft` over the rig's model and rows, in their order, at learning rate 0; registers what it names."""
    if "bare" not in TEMPLATE_MAPPING:
        register_template(TemplateMeta("bare", prefix=[], prompt=["{{QUERY}}"], chat_sep=[], suffix=[["eos_token_id"]]))
    register(tau=host_rig.TAU)
    return f"""
        --model {folder}/model --model_type llama --template bare --torch_dtype float32 --tuner_type full
        --dataset {folder}/rows.jsonl --output_dir {folder}/out --num_train_epochs 1 --learning_rate 0
        --dataset_shuffle false --train_dataloader_shuffle false --split_dataset_ratio 0 --save_strategy no
        --logging_steps 1 --report_to none --max_grad_norm 0 --callbacks gft --remove_unused_columns false
        --gradient_checkpointing false --load_from_cache_file false --check_model false
    """.split()


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    host_rig.write_model(tmp_path / "model")
    host_rig.write_rows(tmp_path / "rows.jsonl", message_rows(host_rig.rows()))
    return command_line(tmp_path)


def trained(arguments: list[str], seen: host_rig.Gradients | None = None) -> host_rig.Gradients:
    seen = seen or host_rig.Gradients()
    with host_rig.in_every_trainer(seen):
        sft_main(arguments)
    return seen


def test_the_hooks_are_where_the_adapter_looks_for_them():
    assert list(inspect.signature(Template.compute_sft_loss).parameters)[1:] == [
        "model", "inputs", "num_items_in_batch", "trainer"]  # fmt: skip
    assert "(labels[:, 1:] != -100).sum() / num_items_in_batch" in inspect.getsource(Template.compute_sft_loss)
    assert "callbacks_map[callback](args, self)" in inspect.getsource(Seq2SeqTrainer._get_callbacks)
    assert "_extra_kwargs" in inspect.getsource(Template.data_collator)
    assert "gft" not in callbacks_map or callbacks_map["gft"].__module__ == "gft_kernels.integrations.swift"


@pytest.mark.parametrize(("micro_batch", "accumulation"), [(8, 1), (2, 4), (1, 8)])
def test_a_step_is_the_formulas_however_it_is_cut(arguments, tmp_path, micro_batch, accumulation):
    cut = ["--per_device_train_batch_size", str(micro_batch), "--gradient_accumulation_steps", str(accumulation)]
    seen = trained([*arguments, *cut])
    host_rig.assert_steps(seen, host_rig.expected_steps(tmp_path / "model", host_rig.encoded_rows()))


@pytest.mark.parametrize("turns", [("user", "assistant", "user"), ("user", "assistant")])
def test_earlier_turns_of_the_assistant_are_not_trained(arguments, tmp_path, turns):
    """The second conversation ends in the beginning of an answer, which the response goes on with."""
    prompt = [{"role": role, "content": "12+3"} for role in turns]
    made = [{**row, "prompt": prompt} for row in host_rig.rows(host_rig.WINDOW)]
    host_rig.write_rows(tmp_path / "rows.jsonl", message_rows(made))
    seen = trained([*arguments, "--per_device_train_batch_size", str(host_rig.WINDOW)])
    plain = [{**row, "prompt": "12+3" * len(turns)} for row in made]  # what the template "bare" makes of them
    host_rig.assert_steps(seen, host_rig.expected_steps(tmp_path / "model", host_rig.encoded_rows(plain)))


def test_two_processes_take_the_same_step(tmp_path):
    made = host_rig.rows(host_ranks.ROWS)
    host_rig.write_model(tmp_path / "model")
    host_rig.write_rows(tmp_path / "rows.jsonl", message_rows(made))
    seen = host_ranks.launch("swift", tmp_path)
    host_rig.assert_steps(seen, host_rig.expected_steps(tmp_path / "model", host_rig.encoded_rows(made)))


def test_a_setting_that_would_lose_the_column_is_an_error(arguments):
    """One through the command line; the others below, as fast."""
    with pytest.raises(ValueError, match="remove_unused_columns must be False with GFT"):
        trained([*arguments, "--remove_unused_columns", "true"])


TEMPLATE = {"remove_unused_columns": False, "packing": False, "padding_free": False, "sequence_parallel_size": 1}
ARGUMENTS = {"loss_type": None, "enable_dft_loss": False, "enable_channel_loss": False, "use_logits_to_keep": None,
             "average_tokens_across_devices": True, "label_smoothing_factor": 0.0}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [("packing", True), ("padding_free", True), ("sequence_parallel_size", 2), ("loss_type", "cross_entropy"),
     ("enable_dft_loss", True), ("enable_channel_loss", True), ("average_tokens_across_devices", False),
     ("label_smoothing_factor", 0.1), ("use_logits_to_keep", True)],
)  # fmt: skip
def test_settings_that_would_change_the_loss_are_errors(name, value):
    check_settings(SimpleNamespace(**ARGUMENTS), SimpleNamespace(**TEMPLATE))
    changed = [
        SimpleNamespace(**{k: value if k == name else v for k, v in part.items()}) for part in (ARGUMENTS, TEMPLATE)
    ]
    with pytest.raises(ValueError, match=f"{name} must be"):
        check_settings(*changed)


def test_the_settings_have_the_names_that_are_checked():
    assert {field.name for field in dataclasses.fields(SftArguments)} >= {*ARGUMENTS, "remove_unused_columns"}
    assert set(inspect.signature(Template.__init__).parameters) >= set(TEMPLATE) - {"packing"}
    assert "self.packing = " in inspect.getsource(Template.__init__)


def test_what_the_template_would_not_see_is_an_error():
    row = {"prompt": [{"role": "user", "content": "a"}], "response": "b", "tools": [{"name": "c"}]}
    with pytest.raises(ValueError, match=r"rows must have no `tools` with ms-swift, got .* 'c'"):
        message_rows([row])


def test_rows_without_advantages_are_an_error(arguments, tmp_path):
    made = message_rows(host_rig.rows())
    host_rig.write_rows(tmp_path / "rows.jsonl", [{"messages": row["messages"]} for row in made])
    with pytest.raises(ValueError, match="gft_advantages must come with every row"):
        trained(arguments)


def test_options_are_checked_at_registration():
    with pytest.raises(ValueError, match=r"tau must lie in \[0, 1\]"):
        register(tau=2.0)
    with pytest.raises(ValueError, match="reduction must be 'token-mean' with rows"):
        register(reduction="sum")
