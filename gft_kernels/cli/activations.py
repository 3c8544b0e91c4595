"""What the layers of a model keep for their backward, counted on a model without memory: no formula for each family.

The forward runs on fake tensors (shapes alone, of one and of two layers) and what autograd is handed is added up. That
is linear in tokens and in layers, so two lengths and two depths tell the rest; what does not grow with the tokens, such
as weights cast to 16 bit, falls out of the difference.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM

from gft_kernels.cli.forecast import Batches, Shape, precision
from gft_kernels.trainer.config import GFTConfig

LENGTHS, DEPTHS = (64, 128), (1, 2)


def activation_memory(config: GFTConfig, model_config: Any, model: Shape, plan: Batches, prompt: int) -> float | None:
    """Bytes on one rank that a micro-batch's forward keeps, every response at full length; None: not to be known.

    prompt: tokens of the longest one. With gradient_checkpointing each layer keeps its input, and one is worked again.
    """
    per_token = saved_by_token(model_config, config.bf16 or config.fp16)
    if per_token is None:
        return None
    beside, layer = per_token
    tokens = plan.rows_per_micro_batch * ((config.max_prompt_length or prompt) + config.max_completion_length)
    if config.gradient_checkpointing:
        return tokens * (beside + layer + model.layers * model.hidden * precision(config))
    return tokens * (beside + model.layers * layer)


def saved_by_token(model_config: Any, autocast: bool) -> tuple[float, float] | None:
    """Bytes a token beside the layers, and in each of them; None where fake tensors cannot run the model."""
    logging.getLogger("torch._subclasses").setLevel(logging.ERROR)
    try:
        slopes = []
        for depth in DEPTHS:
            short, long = (saved(model_config, depth, length, autocast) for length in LENGTHS)
            slopes.append((long - short) / (LENGTHS[1] - LENGTHS[0]))
    except Exception:  # a model's code may ask for numbers, and fail in its own way on there being none
        return None
    layer = slopes[1] - slopes[0]
    return slopes[0] - layer, layer


def saved(model_config: Any, depth: int, length: int, autocast: bool) -> int:
    """Bytes that one sequence's forward keeps, parameters left out and what shares memory counted once."""
    model_config = copy.deepcopy(model_config)
    model_config.get_text_config(decoder=True).num_hidden_layers = depth
    kept: dict[int, Any] = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(model_config).train()
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        ids = torch.ones(1, length, dtype=torch.int64)
        with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            # bound, so that what it keeps is not let go and its place taken while it is counted
            output = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        del output
    return sum(storage.nbytes() for place, storage in kept.items() if place not in own)
