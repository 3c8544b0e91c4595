"""What a run will do and need, before it starts: prompts and steps over the ranks, and memory on each of them.

The formulas are in docs/training.md#dry-run. Memory is in bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from gft_kernels.linear import chunks
from gft_kernels.trainer import peft_adapters
from gft_kernels.trainer.config import GFTConfig

FLOAT = 4  # bytes of a float32; the trainer loads its weights so


@dataclass(frozen=True)
class Shape:
    """What memory depends on in a model."""

    parameters: int
    trained: int  # of them
    vocabulary: int
    hidden: int
    layers: int
    kv_heads: int
    head_dim: int


def shape_of(config, lora: Any = None) -> Shape:
    """From a transformers configuration; the parameters are counted on a model without memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
        if lora is not None:
            model = peft_adapters.adapted(model, lora)
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        vocabulary=text.vocab_size,
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
    )


@dataclass(frozen=True)
class Batches:
    """Prompts, responses and steps of a run. Counts of all ranks together, unless they say otherwise."""

    ranks: int
    group: int  # responses of a prompt
    prompts_per_step: int
    prompts_per_rollout: int
    rollouts_per_rank: int  # prompts one rank samples at once
    steps_per_epoch: int
    steps: int
    rows_per_micro_batch: int  # on one rank


def batches(config: GFTConfig, rows: int, ranks: int, group: int) -> Batches:
    here = config.per_device_train_batch_size * config.gradient_accumulation_steps
    whole = math.floor if config.dataloader_drop_last else math.ceil
    micro_batches = whole(rows / (config.per_device_train_batch_size * ranks))
    steps_per_epoch = math.ceil(micro_batches / config.gradient_accumulation_steps) * config.num_iterations
    steps = config.max_steps if config.max_steps > 0 else math.ceil(steps_per_epoch * config.num_train_epochs)
    return Batches(
        ranks=ranks,
        group=group,
        prompts_per_step=here * ranks,
        prompts_per_rollout=here * ranks * config.steps_per_rollout,
        rollouts_per_rank=here * config.steps_per_rollout if config.num_generations else 0,
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        rows_per_micro_batch=config.per_device_train_batch_size * group,
    )


def precision(config: GFTConfig) -> int:
    """Bytes of a number the model computes with."""
    return 2 if config.bf16 or config.fp16 else FLOAT


def weights_memory(config: GFTConfig, model: Shape, ranks: int) -> dict[str, dict[str, float]]:
    """Bytes of weights, gradients and AdamW's two moments on one rank, by what lies in parts.

    Under mixed precision DeepSpeed has 16-bit weights and gradients, and a float32 copy with the optimizer.
    """
    p, t, low, n = model.parameters, model.trained, precision(config), ranks
    states = (2 if low == FLOAT else 3) * t * FLOAT
    return {
        "DDP": {"weights": p * FLOAT, "gradients": t * FLOAT, "optimizer": 2 * t * FLOAT},
        "ZeRO-2": {"weights": p * low, "gradients": t * low / n, "optimizer": states / n},
        "FSDP2": {"weights": p * FLOAT / n, "gradients": t * FLOAT / n, "optimizer": 2 * t * FLOAT / n},
        "ZeRO-3": {"weights": p * low / n, "gradients": t * low / n, "optimizer": states / n},
    }


def other_memory(config: GFTConfig, model: Shape, plan: Batches, longest_prompt: int) -> dict[str, float]:
    """Bytes on one rank beside weights, gradients and optimizer, and beside what the layers keep (activations.py)."""
    rows = plan.rows_per_micro_batch * config.max_completion_length
    chunk = chunks.chunk_rows(rows, model.vocabulary, 4, "cuda")
    calls = min(config.generation_batch_size or plan.rollouts_per_rank, plan.rollouts_per_rank)
    per_token = 2 * model.layers * model.kv_heads * model.head_dim * precision(config)
    tokens = (config.max_prompt_length or longest_prompt) + config.max_completion_length
    in_float32 = model.vocabulary * (chunk + model.hidden)
    found = {
        "fused loss: one chunk of logits, head gradient in float32": float(FLOAT * in_float32),
        "KV cache of a rollout": float(calls * config.num_generations * tokens * per_token),
    }
    if config.log_kl or config.beta:
        found["copy of the starting weights"] = float(model.parameters * FLOAT)
    return found


def full_logits_memory(config: GFTConfig, model: Shape, plan: Batches) -> float:
    """Bytes of float32 logits and their gradient for the responses of one micro-batch: what the fused loss saves."""
    return 2 * 4.0 * plan.rows_per_micro_batch * config.max_completion_length * model.vocabulary
