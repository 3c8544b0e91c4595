"""`gft merge`: the whole model says what base and adapter say together."""

from __future__ import annotations

import json

import pytest
import torch
import trainer_rig as rig
from transformers import AutoModelForCausalLM, AutoTokenizer

from gft_kernels.cli import main
from gft_kernels.trainer import peft_adapters

peft = pytest.importorskip("peft")


@pytest.fixture
def adapted(tmp_path, model_path):
    """A model in bfloat16 on disk, and a folder with an adapter for it."""
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    rig.tokenizer().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, lora)
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path


def test_the_merged_model_is_base_and_adapter(adapted, capsys):
    model, folder = adapted
    assert main(["merge", str(folder / "adapter"), "--out", str(folder / "merged")]) == 0
    assert "hf upload YOUR_NAME/merged" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    ids = torch.randint(12, (2, 9))
    assert merged.dtype == torch.bfloat16 and not (folder / "merged" / "adapter_config.json").exists()
    with torch.no_grad():
        expected, plain = model(ids).logits, model.get_base_model()
        found = merged.float()(ids).logits
        with model.disable_adapter():
            without = plain(ids).logits
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)  # weights rounded to bfloat16
    assert (without - expected).abs().max() > 0.2
    assert AutoTokenizer.from_pretrained(folder / "merged").vocab_size == rig.tokenizer().vocab_size


@pytest.mark.parametrize("layer", ["embed_tokens", "lm_head"])
def test_an_adapter_of_one_of_two_tied_layers_leaves_the_other_as_it_is(tmp_path, layer):
    base = rig.llama()
    assert base.config.tie_word_embeddings
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=[layer], init_lora_weights=False))
    ids = torch.randint(12, (2, 9))
    with torch.no_grad():
        expected = model(ids).logits
        peft_adapters.save_merged(model, rig.tokenizer(), str(tmp_path))
        found = AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("run", "out", "sentence"), [
    ("base", "new", "RUN must be a folder with adapter_config.json, got"),
    ("adapter", "base", "--out must be a new or an empty folder, got"),
])  # fmt: skip
def test_what_cannot_be_merged_is_said(adapted, capsys, run, out, sentence):
    folder = adapted[1]
    before = json.dumps(sorted(map(str, folder.rglob("*"))))
    assert main(["merge", str(folder / run), "--out", str(folder / out)]) == 2
    assert f"gft merge: {sentence}" in capsys.readouterr().err
    assert json.dumps(sorted(map(str, folder.rglob("*")))) == before
