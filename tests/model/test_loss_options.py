"""One text of the loss's options for the trainer's own configuration and for TRL's."""

from __future__ import annotations

import dataclasses

import pytest

from gft_kernels.model.loss_options import GroupLossOptions, TokenLossOptions
from gft_kernels.trainer import GFTConfig

CONFIGS = [(GFTConfig, GroupLossOptions, {})]
try:
    from gft_kernels.integrations.trl import GFTGRPOConfig, GFTSFTConfig
except ImportError:  # trl is not installed
    pass
else:
    CONFIGS += [(GFTGRPOConfig, GroupLossOptions, {"num_generations": 4}), (GFTSFTConfig, TokenLossOptions, {})]
each = pytest.mark.parametrize(("config", "mixin", "needs"), CONFIGS, ids=[c.__module__ for c, *_ in CONFIGS])


def made(config, tmp_path, **options):
    return config(str(tmp_path), use_cpu=True, bf16=False, **options)


@each
def test_names_defaults_and_help_are_the_same(config, mixin, needs, tmp_path):
    fields = {field.name: field for field in dataclasses.fields(config)}
    for shared in dataclasses.fields(mixin):
        assert fields[shared.name].default == shared.default
        assert fields[shared.name].metadata["help"] == shared.metadata["help"]
    chosen = made(config, tmp_path, **needs)
    assert chosen.tau == 0.7 and chosen.filter_eps is None
    for text, value in (("5e-4", 5e-4), ("auto", "auto")):  # as a command line brings it
        assert made(config, tmp_path, **needs, filter_eps=text).filter_eps == value
    if mixin is GroupLossOptions:
        assert (chosen.rectify, chosen.normalize, chosen.reduction) == ("all", "std", "token-mean")


@each
@pytest.mark.parametrize(
    ("name", "value"), [("tau", 1.5), ("backend", "gpu"), ("filter_eps", "most"), ("rectify", "none"),
                        ("normalize", "max"), ("advantage_eps", -1.0), ("reduction", "sum")])  # fmt: skip
def test_wrong_values_are_named(config, mixin, needs, tmp_path, name, value):
    if name not in {field.name for field in dataclasses.fields(mixin)}:
        pytest.skip("not an option of this trainer")
    named = "eps" if name == "advantage_eps" else name
    with pytest.raises(ValueError, match=f"{named} must "):
        made(config, tmp_path, **needs, **{name: value})


@each
def test_ligers_kernels_stay_and_its_loss_goes(config, mixin, needs, tmp_path):
    pytest.importorskip("liger_kernel", reason="liger_kernel is not installed")
    found = made(config, tmp_path, **needs, use_liger_kernel=True, liger_kernel_config={"rope": False})
    assert found.liger_kernel_config == {"rope": False, "fused_linear_cross_entropy": False}
    assert made(config, tmp_path, **needs).liger_kernel_config is None
    with pytest.raises(ValueError, match="liger_kernel_config must leave fused_linear_cross_entropy out, got True"):
        asked = {"fused_linear_cross_entropy": True}
        made(config, tmp_path, **needs, use_liger_kernel=True, liger_kernel_config=asked)
