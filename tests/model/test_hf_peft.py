"""Adapters and the patched model: wherever they sit, gradients are those of the logits."""

from __future__ import annotations

import pytest
import torch
from test_hf import ADVANTAGES_S, UPSTREAM, assert_same, batch, gradients
from tiny_families import tiny

from gft_kernels import gft_loss
from gft_kernels.model.patch import patch_model, unpatch_model

peft = pytest.importorskip("peft", reason="peft is not installed")
pytestmark = pytest.mark.filterwarnings("error:the GFT loss")  # the logits are taken only where a test says so


def adapted(family="llama", **options):
    """A tiny model with LoRA; the second factor is not zero, as after some training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **options})
        model = peft.get_peft_model(tiny(family), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.2)
    return model.eval()


def losses(model, inputs):
    """(loss, gradients) of the logits, then of the patched model, called through PEFT."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    extra = logits.shape[1] - inputs["labels"].shape[1]  # what prompt tuning puts in front
    loss = gft_loss(logits[:, extra:-1], inputs["labels"][:, 1:], advantages=ADVANTAGES_S)
    (UPSTREAM * loss).backward()
    expected = loss.item(), gradients(model)
    patch_model(model)
    output = model(**inputs, gft_advantages=ADVANTAGES_S)
    assert output.logits is None
    (UPSTREAM * output.loss).backward()
    return (output.loss.item(), gradients(model)), expected


CASES = {
    "LoRA on the trunk": {},
    "LoRA on the trunk of a softcapped model": {"family": "gemma2"},
    "the head trained in full": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("case", CASES)
def test_the_head_is_used_as_it_is_trained(case):
    ours, theirs = losses(adapted(**CASES[case]), batch("right"))
    assert_same(ours, theirs)
    assert ("base_model.model.lm_head.modules_to_save.default.weight" in ours[1]) == ("in full" in case)


def test_the_trained_head_and_the_one_before_it():
    """disable_adapter() brings the original head back; its copy in modules_to_save must not be read then."""
    model, inputs = adapted(modules_to_save=["lm_head"]), batch("right")
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.mul_(2.0)
    patch_model(model)
    with torch.no_grad():
        trained = model(**inputs).loss
        with model.disable_adapter():
            original = model(**inputs).loss
        unpatch_model(model)
        with model.disable_adapter():
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    expected = gft_loss(logits[:, :-1], inputs["labels"][:, 1:])
    torch.testing.assert_close(original, expected)
    assert abs(trained - original) > 1e-3


def test_a_hook_on_the_wrapper_of_the_trained_head_is_given_logits():
    model, inputs, shapes = patch_model(adapted(modules_to_save=["lm_head"])), batch("right"), []
    model.base_model.model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    with pytest.warns(UserWarning, match="a hook on the output head needs them"):
        model(**inputs)
    assert shapes[0][-1] == 101


def test_lora_on_the_head_takes_the_logits():
    model = adapted(target_modules=["q_proj", "lm_head"])
    with pytest.warns(UserWarning, match="the output head carries an adapter"):
        ours, theirs = losses(model, batch("left"))
    assert_same(ours, theirs)
    assert any("lm_head.lora_A" in name for name in ours[1])


def test_an_adapter_that_comes_after_the_patch():
    model, inputs = patch_model(tiny("llama")), batch("right")
    plain = model(**inputs).loss
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    with pytest.warns(UserWarning, match="the output head carries an adapter"):
        changed = model(**inputs).loss
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    torch.testing.assert_close(changed, gft_loss(logits[:, :-1], inputs["labels"][:, 1:]))
    assert changed != plain
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).loss, changed)


PROMPTS = {
    "prompt tuning": ("PromptTuningConfig", {}),
    "p-tuning": ("PromptEncoderConfig", {"encoder_hidden_size": 8}),
    "prefix tuning": ("PrefixTuningConfig", {}),  # puts keys and values in front, no tokens
}


def prompted(kind, model):
    name, options = PROMPTS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        config = getattr(peft, name)(task_type="CAUSAL_LM", num_virtual_tokens=3, **options)
        model = peft.get_peft_model(model, config)
        for parameter in model.prompt_encoder.parameters():
            parameter.data.mul_(0.1)  # norms divide by the size of an embedding, and so its gradient
        return model


@pytest.mark.parametrize("kind", PROMPTS)
def test_virtual_tokens_shift_what_comes_after_them(kind):
    ours, theirs = losses(prompted(kind, tiny("llama")).eval(), batch("right"))
    assert_same(ours, theirs)
    assert all(name.startswith("prompt_encoder.default.") for name in ours[1])


def test_saving_an_adapter(tmp_path):
    model, inputs = patch_model(adapted()), batch()
    loss = model(**inputs).loss
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(patch_model(tiny("llama")), tmp_path)
    torch.testing.assert_close(again.eval()(**inputs).loss, loss)
