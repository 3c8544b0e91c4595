"""`gft merge`: a run's LoRA adapter, folded into the weights it was trained on."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gft_kernels.data import pretrained
from gft_kernels.trainer.peft_adapters import merged


def merge(run: str, out: str) -> str:
    """Writes the whole model and its tokenizer, and returns what to do with them.

    Sums are taken in float32; the weights are written in the type of the model that the adapter was trained on.
    Raises: ValueError for a folder without an adapter, or `out` with files in it; ImportError without peft.
    """
    if not Path(run, "adapter_config.json").is_file():
        raise ValueError(f"RUN must be a folder with adapter_config.json, got {run!r}; a whole model needs no merging.")
    if Path(out).exists() and any(Path(out).iterdir()):
        raise ValueError(f"--out must be a new or an empty folder, got {out!r}; name another.")
    from peft import PeftConfig, PeftModel

    name = pretrained.located(PeftConfig.from_pretrained(run).base_model_name_or_path)
    with pretrained.transformers_at_rest():
        base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        model = merged(PeftModel.from_pretrained(base, run), safe_merge=True)
        model.to(getattr(AutoConfig.from_pretrained(name), "dtype", None) or torch.float32).save_pretrained(out)
        tokenizer = run if Path(run, "tokenizer_config.json").is_file() else name
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(out)
    return f"model        {out}, from {name} and {run}\nto publish   hf upload YOUR_NAME/{Path(out).name} {out}"
