"""Sampling responses from the current policy, reproducibly."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy
import torch
from transformers import GenerationConfig

from gft_kernels.data import text
from gft_kernels.trainer.ranks import forward_is_collective


@dataclass(frozen=True)
class Sampling:
    """What a rollout function is asked for: the sampling of every prompt it is given."""

    num_generations: int
    max_new_tokens: int
    temperature: float  # 0: greedy
    eos_ids: tuple[int, ...]
    pad_id: int


def generate(model, prompts_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    """Responses from `model.generate`: num_generations consecutive ones per prompt, cut after the first end token.

    This is the default rollout function and the signature of any other. Nothing but the temperature shapes the
    distribution: the model's own generation defaults (top-k, penalties) are set aside, or the samples would not
    come from the policy whose log-probabilities the loss takes.
    """
    width = max(map(len, prompts_ids))
    device = model.device
    input_ids = torch.full((len(prompts_ids), width), sampling.pad_id, dtype=torch.int64)
    attention = torch.zeros_like(input_ids)
    for i, ids in enumerate(prompts_ids):  # left padding: the last prompt token is the one generation goes on from
        input_ids[i, width - len(ids) :] = torch.tensor(ids)
        attention[i, width - len(ids) :] = 1
    with plain_generation(model, generation_config(sampling)):
        out = model.generate(
            input_ids=input_ids.repeat_interleave(sampling.num_generations, 0).to(device),
            attention_mask=attention.repeat_interleave(sampling.num_generations, 0).to(device),
            synced_gpus=forward_is_collective(model),  # a rank that has finished goes on until all have
        )
    return [cut(ids, sampling.eos_ids) for ids in out[:, width:].tolist()]


def cut(ids: list[int], eos_ids: Sequence[int]) -> list[int]:
    """Ids up to and including the first end token."""
    for position, token in enumerate(ids):
        if token in eos_ids:
            return ids[: position + 1]
    return ids


def generation_config(sampling: Sampling) -> GenerationConfig:
    """What transformers is asked for: the plain distribution at one temperature, or its most likely token."""
    warm = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(sampling.eos_ids),
        pad_token_id=sampling.pad_id,
        use_cache=True,
        **(warm if sampling.temperature > 0 else {"do_sample": False}),
    )


@contextmanager
def plain_generation(model, config):
    """The model in eval mode, without gradients, with `config` in place of its own generation defaults."""
    own, training = model.generation_config, model.training
    model.generation_config = config
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.generation_config = own
        model.train(training)


@contextmanager
def seeded(*entropy: int, device: torch.device):
    """Random numbers inside depend on `entropy` alone, and those outside go on as if nothing had happened.

    So the samples of a step are the same in an interrupted and resumed run, and sampling does not disturb dropout.
    """
    seed = int(numpy.random.SeedSequence(entropy).generate_state(1, numpy.uint64)[0] >> 1)
    python, array = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(array)


def end_tokens(model, tokenizer) -> tuple[int, ...]:
    """Every token that ends a response: the tokenizer's, its template's, and those the model's defaults name."""
    return text.end_tokens(tokenizer, getattr(model, "generation_config", None))
