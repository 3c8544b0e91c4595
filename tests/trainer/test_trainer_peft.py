"""Adapters through GFTTrainer: wherever they sit, a step's loss and gradients are those of the model's logits."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import trainer_rig as rig

from gft_kernels import gft_loss
from gft_kernels.trainer.groups import IGNORE

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


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("place", PLACES)
def test_a_step_is_that_of_the_logits(tmp_path, place):
    options = {"num_generations": 3, "tau": 0.05, "temperature": 1.1, "share_prompts": False}
    trainer = rig.trainer(tmp_path, adapted(place), **options)
    micro_batches, num_items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    inputs = micro_batches[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            trainer.model.zero_grad()
            loss = trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=num_items)
            loss.backward()
    said = [str(w.message) for w in caught if "the GFT loss" in str(w.message)]
    assert len(said) == (1 if place == "the head" else 0)
    assert all("the output head carries an adapter" in text for text in said)

    plain, width = adapted(place), inputs["targets"].shape[1]
    logits = plain(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, -width - 1 : -1]
    expected = gft_loss(
        logits, inputs["targets"], advantages=inputs["advantages"], tau=0.05, temperature=1.1,
        num_items_in_batch=num_items, ignore_index=IGNORE,
    )  # fmt: skip
    expected.backward()
    ours, theirs = gradients(trainer.model), gradients(plain)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and abs(loss.item()) > 1e-4
    assert ours.keys() == theirs.keys() and any("lora_B" in name for name in ours)
    assert any("lm_head" in name for name in ours) == (place != "the trunk")
    for name, gradient in theirs.items():
        assert gradient.norm() > 0 and (ours[name] - gradient).norm() <= 2e-5 * gradient.norm(), name


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
