"""Models that bring a loss of their own to GFTTrainer: a router's term, and Liger's forward."""

from __future__ import annotations

import pytest
import torch
import trainer_rig as rig
from transformers import MixtralConfig, MixtralForCausalLM

from gft_kernels.trainer import engines, rollouts

CUTS = [(8, 1), (4, 2), (2, 4), (1, 8)]
OFFLINE = {"reward_funcs": (), "num_generations": 0}


def routed(coefficient: float):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return MixtralForCausalLM(
            MixtralConfig(
                vocab_size=len(rig.tokenizer()), hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, num_local_experts=4,
                num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=coefficient,
                initializer_range=0.2, bos_token_id=None, eos_token_id=1, pad_token_id=0,
            )
        )  # fmt: skip


def losses(tmp_path, model, rows, micro_batch, accumulation, **options) -> list[float]:
    options = {"model": model, "learning_rate": 1e-9, **OFFLINE, **options}
    return rig.step_gradients(tmp_path, rows, micro_batch, accumulation, **options)[1]


@pytest.mark.parametrize("reduction", ["token-mean", "sequence-mean"])
def test_a_routers_term_counts_once_a_step_however_it_is_cut(tmp_path, reduction):
    """11 prompts: two windows, the second partial, and micro-batches whose rows are all beyond the last prompt."""
    rows = rig.offline_rows(11)
    without = losses(tmp_path, routed(0.0), rows, *CUTS[0], reduction=reduction)  # the same for every cut
    found = []
    for cut in CUTS if reduction == "token-mean" else CUTS[::3]:
        added = losses(tmp_path, routed(1.0), rows, *cut, reduction=reduction)
        found.append([after - before for before, after in zip(without, added, strict=True)])
        # About 2, the experts a token takes; few tokens load them less evenly, so small micro-batches differ a little.
        assert found[-1] == pytest.approx(found[0], abs=0.35)
        assert all(1.9 < term < 2.6 for term in found[-1])


def test_ligers_kernels_train_gfts_loss(tmp_path, monkeypatch):
    liger = pytest.importorskip("liger_kernel.transformers", reason="liger_kernel is not installed")
    applied = []
    own = liger._apply_liger_kernel_to_instance
    monkeypatch.setattr(liger, "_apply_liger_kernel_to_instance", lambda **given: applied.append(given) or own(**given))
    rows = rig.offline_rows(4)
    off = dict.fromkeys(("rope", "rms_norm", "swiglu"), False)  # those need a GPU
    expected = losses(tmp_path, rig.llama(), rows, 2, 2)
    for metrics in (True, False):
        found = losses(
            tmp_path, rig.llama(), rows, 2, 2, use_liger_kernel=True, liger_kernel_config=off, token_metrics=metrics
        )
        assert found == pytest.approx(expected, rel=1e-5)
    assert len(applied) == 2 and all(given["fused_linear_cross_entropy"] is False for given in applied)


@pytest.mark.parametrize("rollout", ["generate", "continuous"])
def test_a_router_whose_load_is_balanced_is_sampled_from(tmp_path, rollout):
    """Decoding counts no loss of the router: the term would be taken over a prompt whose mask is longer."""
    model, flags = routed(0.5), []
    if rollout == "continuous" and (reason := engines.no_continuous(model)):
        pytest.skip(reason)
    trainer = rig.trainer(tmp_path, model, max_steps=1, num_generations=2, evaluation=rig.rows(3), rollout=rollout)
    model.register_forward_pre_hook(lambda *_: flags.append(model.config.output_router_logits))
    trainer.train()
    assert "reward/sampled" in trainer.state.log_history[0] and "eval_reward" in trainer.evaluate()
    assert flags[0] is False and model.config.output_router_logits is True
    with pytest.raises(KeyError), rollouts.plain_generation(model, model.generation_config):
        assert not model.config.output_router_logits
        raise KeyError
    assert model.config.output_router_logits is True
