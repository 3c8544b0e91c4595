"""A LoRA adapter from the settings of a run, by peft, which is optional."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from gft_kernels.data.pretrained import transformers_at_rest
from gft_kernels.trainer.config_checks import nearest

MERGE = "merge"  # the one key of ours beside those of peft.LoraConfig


def lora_config(options: Mapping[str, Any]) -> Any:
    """peft.LoraConfig of these options; `merge` is looked at elsewhere. Raises ValueError, ImportError."""
    if importlib.util.find_spec("peft") is None:
        raise ImportError("peft must be installed for an adapter, got none; pip install peft.")
    from peft import LoraConfig

    known = {field.name for field in dataclasses.fields(LoraConfig) if field.init}
    for name in options:
        if name not in known | {MERGE}:
            hint = nearest(str(name), known | {MERGE}, "see peft's documentation.")
            raise ValueError(f"key `{name}` of peft must be an option of peft.LoraConfig, got one that is not; {hint}")
    if not isinstance(options.get(MERGE, False), bool):
        raise ValueError(f"key `{MERGE}` of peft must be true or false, got {options[MERGE]!r}.")
    own = {name: value for name, value in options.items() if name != MERGE}
    return LoraConfig(**{"task_type": "CAUSAL_LM", **own})


def adapted(model: Any, lora: Any) -> Any:
    """The model under a fresh adapter: its own weights stay as they are. Raises ValueError."""
    from peft import get_peft_model

    if hasattr(model, "peft_config"):
        raise ValueError("model must be without an adapter where one is asked for, got one with; merge that first.")
    refuse_unknown_targets(model, lora.target_modules)
    with transformers_at_rest():
        return get_peft_model(model, lora)


def refuse_unknown_targets(model: Any, targets: Any) -> None:
    """Raises ValueError for names of layers the model has not: peft passes over one beside others that it finds."""
    paths = [f".{path}" for path, _ in model.named_modules()]
    found = () if targets is None or isinstance(targets, str) else sorted(targets)
    if missing := [name for name in found if not any(path.endswith(f".{name}") for path in paths)]:
        layers = {path.split(".")[-2]: None for path, weight in model.named_parameters() if weight.ndim == 2}
        raise ValueError(
            f"key `target_modules` of peft must name layers of the model, got {', '.join(missing)}; "
            f"it has {', '.join(layers)}, or say all-linear."
        )


def refuse_merging(distributed_type: Any) -> None:
    """Raises ValueError where no rank has the whole weights to merge into."""
    if distributed_type in ("FSDP", "DEEPSPEED"):
        kind = distributed_type.value
        raise ValueError(f"key `{MERGE}` of peft must be false with {kind}, got true; merge the saved adapter later.")


def save_merged(model: Any, tokenizer: Any, folder: str) -> None:
    """The model that an adapter makes of its base, which changes in place; an adapter saved there would act again."""
    for path in Path(folder).glob("adapter_*"):
        path.unlink()
    merged(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def merged(model: Any, **options: Any) -> Any:
    """The model that an adapter makes of its base, which changes in place; options: of peft's merge_and_unload.

    An adapter of one of two tied layers would be merged into both: the head gets a weight of its own first.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    if any(isinstance(end, BaseTunerLayer) for end in ends) and ends[0].weight is ends[1].weight:
        head = getattr(ends[1], "base_layer", ends[1])
        head.weight = nn.Parameter(head.weight.detach().clone())
    return model.merge_and_unload(**options)
