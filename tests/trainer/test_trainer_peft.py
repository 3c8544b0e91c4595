"""Adapters through GFTTrainer: wherever they sit, they are trained and nothing else is."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import trainer_rig as rig

peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")

PLACES = {
    "the trunk": {"target_modules": ["q_proj", "v_proj"]},
    "the head in full": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "the head": {"target_modules": ["q_proj", "lm_head"]},
}


def adapted(place):
    """LoRA whose second factor is not zero, as after some training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = peft.get_peft_model(rig.untied_llama(), peft.LoraConfig(r=2, init_lora_weights=False, **PLACES[place]))
        model.generation_config.eos_token_id = 1
        return model


@pytest.mark.parametrize("place", PLACES)
def test_a_run_trains_the_adapter_and_nothing_else(tmp_path, place):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the GFT loss")
        trainer = rig.trainer(tmp_path, adapted(place), objective="dapo", beta=0.1, steps_per_rollout=2, max_steps=2)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert moved == trained and moved
    line = trainer.state.log_history[0]
    assert line["kl_to_start"] == pytest.approx(0, abs=1e-9) and line["drift/kl"] == pytest.approx(0, abs=1e-9)
    trainer.save_model(str(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(rig.untied_llama(), tmp_path / "adapter")
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids).logits, trainer.model.eval()(ids).logits)


@pytest.mark.parametrize(
    "config", [{"name": "PromptTuningConfig"}, {"name": "PromptEncoderConfig", "encoder_hidden_size": 8},
               {"name": "PrefixTuningConfig"}], ids=lambda c: c["name"],
)  # fmt: skip
def test_virtual_tokens_are_refused_by_name(tmp_path, config):
    options = copy.copy(config)
    made = getattr(peft, options.pop("name"))(task_type="CAUSAL_LM", num_virtual_tokens=3, **options)
    with pytest.raises(
        ValueError, match=rf"model must be adapted in its weights, got {made.peft_type.value}; its virtual"
    ):
        rig.trainer(tmp_path, peft.get_peft_model(rig.llama(), made))
