"""GFTCallback in the installed LLaMA-Factory: its hooks as expected, and steps equal to the formula's."""

from __future__ import annotations

import inspect

import pytest

pytest.importorskip(
    "llamafactory.train.tuner", reason="LLaMA-Factory is not installed here: pip install llamafactory==0.9.5"
)

import host_ranks
import host_rig
import transformers
from llamafactory.data import loader
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
from llamafactory.train.tuner import run_exp

from gft_kernels.integrations.llamafactory import GFTCallback, write_tokenised


def settings(folder) -> dict:
    """A run over the rig's model and rows, in their order, at learning rate 0."""
    return {
        "stage": "sft", "do_train": True, "model_name_or_path": str(folder / "model"), "template": "empty",
        "dataset": "rows", "tokenized_path": str(folder / "rows"), "finetuning_type": "full",
        "output_dir": str(folder / "out"), "num_train_epochs": 1, "learning_rate": 0.0, "max_grad_norm": 0.0,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "use_cpu": True, "disable_shuffling": True, "disable_gradient_checkpointing": True,
    }  # fmt: skip


@pytest.fixture
def arguments(tmp_path) -> dict:
    host_rig.write_model(tmp_path / "model")
    write_tokenised(tmp_path / "rows", host_rig.rows(), host_rig.tokenizer())
    return settings(tmp_path)


def trained(arguments: dict) -> host_rig.Gradients:
    seen = host_rig.Gradients()
    run_exp(arguments, callbacks=[GFTCallback(tau=host_rig.TAU), seen])
    return seen


def test_the_hooks_are_where_the_adapter_looks_for_them():
    assert list(inspect.signature(run_exp).parameters) == ["args", "callbacks"]
    assert "load_from_disk(data_args.tokenized_path)" in inspect.getsource(loader.get_dataset)
    assert "on_init_end(self.args, self.state, self.control)" in inspect.getsource(transformers.Trainer.__init__)
    assert "self.compute_loss_func = dft_loss_func" in inspect.getsource(CustomSeq2SeqTrainer.__init__)


@pytest.mark.parametrize(("micro_batch", "accumulation"), [(8, 1), (2, 4), (1, 8)])
def test_a_step_is_the_formulas_however_it_is_cut(arguments, tmp_path, micro_batch, accumulation):
    cut = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": accumulation}
    seen = trained({**arguments, **cut})
    host_rig.assert_steps(seen, host_rig.expected_steps(tmp_path / "model", host_rig.encoded_rows()))


def test_two_processes_take_the_same_step(tmp_path):
    made = host_rig.rows(host_ranks.ROWS)
    host_rig.write_model(tmp_path / "model")
    write_tokenised(tmp_path / "rows", made, host_rig.tokenizer())
    seen = host_ranks.launch("llamafactory", tmp_path)
    host_rig.assert_steps(seen, host_rig.expected_steps(tmp_path / "model", host_rig.encoded_rows(made)))


def test_lora_trains_what_it_adds(arguments, tmp_path):
    """Under PEFT the guard and the loss sit on different modules, and both still stand in the way of the batch."""
    seen = trained({**arguments, "finetuning_type": "lora", "lora_target": "q_proj", "lora_rank": 2})
    given = {name for name, gradient in seen.steps[0].items() if "lora_B" in name and gradient.abs().max() > 0}
    assert len(given) == 2  # one in each layer
    wanted = [loss for loss, _ in host_rig.expected_steps(tmp_path / "model", host_rig.encoded_rows())]
    assert seen.losses == pytest.approx(wanted, abs=2e-3)  # adapters begin at 0, so the loss is the model's own


@pytest.mark.parametrize("loss", ["use_dft_loss", "use_eaft_loss"])
def test_another_loss_is_an_error(arguments, loss):
    with pytest.raises(ValueError, match="labels must be given with gft_advantages"):
        trained({**arguments, loss: True})


def test_a_count_per_rank_is_an_error(arguments):
    with pytest.raises(ValueError, match="average_tokens_across_devices must be True with GFT"):
        trained({**arguments, "average_tokens_across_devices": False})


def test_rows_without_advantages_are_an_error(arguments, tmp_path):
    from datasets import Dataset, DatasetDict

    bare = [{name: row[name] for name in row if name != "gft_advantages"} for row in host_rig.encoded_rows()]
    DatasetDict({"train": Dataset.from_list(bare)}).save_to_disk(str(tmp_path / "bare"))
    with pytest.raises(ValueError, match="gft_advantages must come with every row"):
        trained({**arguments, "tokenized_path": str(tmp_path / "bare")})


def test_a_row_that_is_too_long_is_named(tmp_path):
    with pytest.raises(ValueError, match="max_length = 12 tokens, got"):
        write_tokenised(tmp_path / "rows", host_rig.rows(), host_rig.tokenizer(), max_length=12)
