"""GFTPlugin in the installed axolotl: hooks as expected, configuration checked, and steps equal to the formula's."""

from __future__ import annotations

import functools
import inspect

import pytest

pytest.importorskip("axolotl.train", reason="axolotl is not installed here: pip install axolotl==0.19.0")

import host_ranks
import host_rig
import torch
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.cli.train import do_train
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.utils.dict import DictDefault

PLUGIN = "gft_kernels.integrations.axolotl"


def configuration(folder, **changes):
    """What axolotl's `load_cfg` makes of a run over the rig's model and rows, in their order, at learning rate 0."""
    PluginManager.get_instance().plugins.clear()  # a singleton that keeps the plugins of earlier configurations
    settings = DictDefault({
        "base_model": str(folder / "model"), "plugins": [f"{PLUGIN}.GFTPlugin"], "gft": {"tau": host_rig.TAU},
        "datasets": [{"path": str(folder / "rows.jsonl"), "ds_type": "json", "type": PLUGIN}],
        "dataset_prepared_path": str(folder / "prepared"), "output_dir": str(folder / "out"),
        "sequence_len": 96, "micro_batch_size": 2, "gradient_accumulation_steps": 4, "num_epochs": 1,
        "learning_rate": 0.0, "max_grad_norm": 0.0, "optimizer": "adamw_torch", "attn_implementation": "sdpa",
        "fp16": False, "bf16": False, "val_set_size": 0, "logging_steps": 1, "save_strategy": "no",
        "curriculum_sampling": True, "shuffle_merged_datasets": False, "dataloader_drop_last": False,
        "gradient_checkpointing": False,
    })  # fmt: skip
    settings.update(changes)
    return load_cfg(settings)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """`configuration` over a folder with the rig's model and rows."""
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    host_rig.write_model(tmp_path / "model")
    host_rig.write_rows(tmp_path / "rows.jsonl", host_rig.rows())
    return functools.partial(configuration, tmp_path)


def trained(cfg, seen: host_rig.Gradients | None = None) -> host_rig.Gradients:
    seen = seen or host_rig.Gradients()
    with host_rig.in_every_trainer(seen):
        do_train(cfg, TrainerCliArgs())
    return seen


def test_the_hooks_are_where_the_plugin_looks_for_them():
    for name, parameters in (
        ("get_input_args", ["self"]),
        ("post_model_load", ["self", "cfg", "model"]),
        ("get_trainer_cls", ["self", "cfg"]),
        ("get_training_args", ["self", "cfg"]),
    ):
        assert list(inspect.signature(getattr(BasePlugin, name)).parameters) == parameters
    source = inspect.getsource(AxolotlTrainer.__init__)
    assert "model_accepts_loss_kwargs = False" in source and "self.eval_data_collator" in source


@pytest.mark.parametrize(("micro_batch", "accumulation"), [(8, 1), (2, 4), (1, 8)])
def test_a_step_is_the_formulas_however_it_is_cut(config, tmp_path, micro_batch, accumulation):
    cfg = config(micro_batch_size=micro_batch, gradient_accumulation_steps=accumulation)
    seen = trained(cfg)
    host_rig.assert_steps(seen, host_rig.expected_steps(tmp_path / "model", host_rig.encoded_rows()))


def test_two_processes_take_the_same_step(tmp_path):
    made = host_rig.rows(host_ranks.ROWS)
    host_rig.write_model(tmp_path / "model")
    host_rig.write_rows(tmp_path / "rows.jsonl", made)
    seen = host_ranks.launch("axolotl", tmp_path)
    host_rig.assert_steps(seen, host_rig.expected_steps(tmp_path / "model", host_rig.encoded_rows(made)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gft": {"tau": 1.5}}, r"tau must lie in \[0, 1\]"),
        ({"use_eaft": True}, "use_eaft must be unset with the GFT plugin"),
        ({"rl": "grpo"}, "rl must be unset with the GFT plugin"),
        ({"train_on_inputs": True}, "train_on_inputs must be unset with the GFT plugin"),
        ({"sequence_parallel_degree": 2}, "sequence_parallel_degree must be 1 with the GFT plugin"),
    ],
)
def test_the_configuration_is_checked_before_anything_is_loaded(config, changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_a_misspelt_option_is_an_error(config):
    with pytest.raises(TypeError, match="taw must be an option of policy_loss"):
        config(gft={"taw": 0.5})


def test_rows_without_advantages_are_an_error(config, tmp_path):
    bare = [{name: row[name] for name in ("prompt", "response")} for row in host_rig.rows()]
    host_rig.write_rows(tmp_path / "rows.jsonl", bare)
    with pytest.raises(Exception, match="gft_advantages"):
        trained(config())


def test_packed_rows_keep_their_advantages(config, tmp_path):
    cfg = config(sample_packing=True, micro_batch_size=1, gradient_accumulation_steps=1, sequence_len=512,
                 pad_to_sequence_len=True, sample_packing_sequentially=True)  # fmt: skip
    seen = trained(cfg)
    encoded = host_rig.encoded_rows()
    host_rig.assert_steps(seen, host_rig.expected_steps(tmp_path / "model", encoded, window=len(encoded)))
    assert torch.isfinite(torch.tensor(seen.losses)).all()
