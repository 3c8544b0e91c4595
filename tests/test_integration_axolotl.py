"""GFTPlugin in the installed axolotl: hooks as expected, configuration checked, and steps equal to the formula's."""

from __future__ import annotations

import inspect

import pytest

pytest.importorskip("axolotl.train", reason="axolotl is not installed here: pip install axolotl==0.19.0")

import host_rig
import torch
import transformers
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.cli.train import do_train
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.utils.dict import DictDefault

PLUGIN = "gft_kernels.integrations.axolotl"


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Writes a configuration over the rig's model and rows; returns what `load_cfg` makes of it."""
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    PluginManager.get_instance().plugins.clear()  # a singleton that keeps the plugins of earlier configurations
    host_rig.write_model(tmp_path / "model")
    host_rig.write_rows(tmp_path / "rows.jsonl", host_rig.rows())

    def make(**changes):
        settings = DictDefault({
            "base_model": str(tmp_path / "model"), "plugins": [f"{PLUGIN}.GFTPlugin"], "gft": {"tau": host_rig.TAU},
            "datasets": [{"path": str(tmp_path / "rows.jsonl"), "ds_type": "json", "type": PLUGIN}],
            "dataset_prepared_path": str(tmp_path / "prepared"), "output_dir": str(tmp_path / "out"),
            "sequence_len": 96, "micro_batch_size": 2, "gradient_accumulation_steps": 4, "num_epochs": 1,
            "learning_rate": 0.0, "max_grad_norm": 0.0, "optimizer": "adamw_torch", "attn_implementation": "sdpa",
            "fp16": False, "bf16": False, "val_set_size": 0, "logging_steps": 1, "save_strategy": "no",
            "curriculum_sampling": True, "shuffle_merged_datasets": False, "dataloader_drop_last": False,
            "gradient_checkpointing": False,
        })  # fmt: skip
        settings.update(changes)
        return load_cfg(settings)

    return make


def trained(cfg, monkeypatch) -> host_rig.Gradients:
    seen = host_rig.Gradients()
    monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", [*transformers.trainer.DEFAULT_CALLBACKS, seen])
    do_train(cfg, TrainerCliArgs())
    return seen


def test_the_hooks_are_where_the_plugin_looks_for_them():
    for name, parameters in (
        ("get_input_args", ["self"]),
        ("post_model_load", ["self", "cfg", "model"]),
        ("get_trainer_cls", ["self", "cfg"]),
    ):
        assert list(inspect.signature(getattr(BasePlugin, name)).parameters) == parameters
    source = inspect.getsource(AxolotlTrainer.__init__)
    assert "model_accepts_loss_kwargs = False" in source and "self.eval_data_collator" in source


@pytest.mark.parametrize(("micro_batch", "accumulation"), [(8, 1), (2, 4), (1, 8)])
def test_a_step_is_the_formulas_however_it_is_cut(config, tmp_path, monkeypatch, micro_batch, accumulation):
    cfg = config(micro_batch_size=micro_batch, gradient_accumulation_steps=accumulation)
    seen = trained(cfg, monkeypatch)
    host_rig.assert_steps(seen, host_rig.expected_steps(tmp_path / "model", host_rig.encoded_rows()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gft": {"tau": 1.5}}, r"tau must lie in \[0, 1\]"),
        ({"gft": {"rectify": "some"}}, "rectify must be one of"),
        ({"gft": {"backend": "gpu"}}, "backend must be one of"),
        ({"use_eaft": True}, "use_eaft must be unset with the GFT plugin"),
        ({"rl": "grpo"}, "rl must be unset with the GFT plugin"),
    ],
)
def test_the_configuration_is_checked_before_anything_is_loaded(config, changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_a_misspelt_option_is_an_error(config):
    with pytest.raises(TypeError, match="taw must be an option of policy_loss"):
        config(gft={"taw": 0.5})


def test_rows_without_advantages_are_an_error(config, tmp_path, monkeypatch):
    bare = [{name: row[name] for name in ("prompt", "response")} for row in host_rig.rows()]
    host_rig.write_rows(tmp_path / "rows.jsonl", bare)
    with pytest.raises(Exception, match="gft_advantages"):
        trained(config(), monkeypatch)


def test_packed_rows_keep_their_advantages(config, tmp_path, monkeypatch):
    cfg = config(sample_packing=True, micro_batch_size=1, gradient_accumulation_steps=1, sequence_len=512,
                 pad_to_sequence_len=True, sample_packing_sequentially=True)  # fmt: skip
    seen = trained(cfg, monkeypatch)
    encoded = host_rig.encoded_rows()
    host_rig.assert_steps(seen, host_rig.expected_steps(tmp_path / "model", encoded, window=len(encoded)))
    assert torch.isfinite(torch.tensor(seen.losses)).all()
