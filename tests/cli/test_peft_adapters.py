"""The section `peft` of a configuration: the adapter that is trained, saved, resumed, merged; and what it refuses."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import trainer_rig as rig
from cli_rig import write_run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gft_kernels.cli import main

pytestmark = pytest.mark.usefixtures("undrawn")

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor([[4, 5, 6]])).logits


@needs_peft
def test_a_run_trains_an_adapter_goes_on_with_it_and_merges_it(tmp_path, model_path, capsys, recwarn):
    import peft

    config = write_run(tmp_path, model_path, peft=LORA, max_steps=2, learning_rate=0.05)
    run = tmp_path / "run"
    assert main(["train", "--config", config]) == 0
    weights = sum(p.numel() for p in rig.llama().parameters())
    assert f"{(weights + 256) / 1e6:.1f} M parameters on cpu, 0.00 M of them trained" in capsys.readouterr().out
    assert not [w for w in recwarn if "is_gradient_checkpointing" in str(w.message)]  # peft's, read by nobody here
    assert not (run / "model.safetensors").exists()
    assert f"gft merge {run} --out FOLDER" in (run / "README.md").read_text()
    trained = load_file(run / "adapter_model.safetensors")
    assert all("lora" in name for name in trained) and any(value.abs().sum() > 0 for value in trained.values())

    more = ["--max_steps", "3", "--peft", str({**LORA, "merge": True}).replace("'", '"').replace("True", "true")]
    assert main(["train", "--config", config, "--resume-anyway", *more]) == 0
    base = AutoModelForCausalLM.from_pretrained(model_path)
    before = logits(base)
    adapted = logits(peft.PeftModel.from_pretrained(base, run / "adapter"))
    merged = AutoModelForCausalLM.from_pretrained(run)
    torch.testing.assert_close(logits(merged), adapted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(adapted, before, atol=1e-3)
    assert load_file(run / "adapter" / "adapter_model.safetensors").keys() == trained.keys()


@needs_peft
def test_a_dry_run_counts_what_is_trained(tmp_path, model_path, capsys):
    config = write_run(tmp_path, model_path, peft={"r": 8, "target_modules": "all-linear"}, num_iterations=3)
    assert main(["train", "--config", config, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "M of them trained" in shown and "1 steps, each taken 3 times = 2 prompts" in shown
    assert "12 steps an epoch" in shown


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"rank": 8}, "key `rank` of peft must be an option of peft.LoraConfig, got one that is not"),
        ({"lora_alfa": 8}, "did you mean `lora_alpha`?"),
        ({"merge": "yes"}, "key `merge` of peft must be true or false, got 'yes'"),
        ({"target_modules": ["q_proj", "nothing"]}, "layers of the model, got nothing; it has embed_tokens, q_proj"),
        (["r"], "key `peft` must be dict, got ['r']"),
    ],
    ids=str,
)
@needs_peft
def test_a_section_that_is_none_is_one_sentence(tmp_path, model_path, capsys, section, sentence):
    assert main(["train", "--config", write_run(tmp_path, model_path, peft=section)]) == 2
    assert sentence in capsys.readouterr().err


def test_without_peft_it_says_so(tmp_path, model_path, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else found(name, *rest))
    assert main(["train", "--config", write_run(tmp_path, model_path, peft=LORA)]) == 2
    assert "peft must be installed for an adapter, got none; pip install peft" in capsys.readouterr().err
