"""Sampling responses from the current policy, reproducibly."""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, StoppingCriteria

from gft_kernels.data import text
from gft_kernels.model.patch import unwrapped
from gft_kernels.model.shared_prompts import cache_name, prompts_cache


@dataclass(frozen=True)
class Sampling:
    """What a rollout function is asked for: the sampling of every prompt it is given."""

    num_generations: int
    max_new_tokens: int
    temperature: float  # 0: greedy
    eos_ids: tuple[int, ...]
    pad_id: int
    top_p: float = 1.0  # these four leave the policy's own distribution
    top_k: int = 0  # 0: all tokens
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_strings: tuple[str, ...] = ()  # a response ends with the token that completes one
    tokenizer: Any = field(default=None, repr=False, compare=False)  # reads them
    share_prompts: bool = field(default=False, compare=False)  # `generate` computes a prompt once for its responses


def generate(model, prompts_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    """Responses from `model.generate`: num_generations consecutive ones per prompt, cut after the first end token.

    This is the default rollout function and the signature of any other. Nothing but `sampling` shapes the
    distribution: the model's own generation defaults (top-k, penalties) are set aside, or the samples would not
    come from the policy whose log-probabilities the loss takes. With `share_prompts` a prompt is computed once.
    """
    width = max(map(len, prompts_ids))
    texts = [torch.tensor(ids, device=model.device) for ids in prompts_ids]
    with plain_generation(model, generation_config(sampling)):
        started = prefilled if sampling.share_prompts and sampling.num_generations > 1 and width > 1 else padded
        out = model.generate(
            **started(model, texts, sampling),
            synced_gpus=forward_is_collective(model),  # a rank that has finished goes on until all have
            stopping_criteria=[Stops(sampling, width)] if sampling.stop_strings else None,
        )
    return [cut(ids, sampling.eos_ids) for ids in out[:, width:].tolist()]


def padded(model, texts: Sequence[Tensor], sampling: Sampling) -> dict[str, Any]:
    """Every response's prompt. Left padding: the last prompt token is the one generation goes on from."""
    texts = [text for text in texts for _ in range(sampling.num_generations)]
    mask = pad_sequence([torch.ones_like(text) for text in texts], True, 0, "left")
    return {"input_ids": pad_sequence(texts, True, sampling.pad_id, "left"), "attention_mask": mask}


def prefilled(model, texts: Sequence[Tensor], sampling: Sampling) -> dict[str, Any]:
    """The same with keys and values of all but each prompt's last token, computed once; padding before that token."""
    last = torch.stack([text[-1:] for text in texts])
    before = pad_sequence([text[:-1] for text in texts], True, sampling.pad_id)
    mask = pad_sequence([torch.ones_like(text[:-1]) for text in texts], True)
    cache = prompts_cache(unwrapped(model), before)
    cache.batch_repeat_interleave(sampling.num_generations)
    whole = {"input_ids": torch.cat([before, last], 1), "attention_mask": torch.cat([mask, torch.ones_like(last)], 1)}
    repeated = {name: value.repeat_interleave(sampling.num_generations, 0) for name, value in whole.items()}
    return {**repeated, cache_name(unwrapped(model)): cache}


def cut(ids: list[int], eos_ids: Sequence[int]) -> list[int]:
    """Ids up to and including the first end token."""
    end = next((number for number, token in enumerate(ids, 1) if token in eos_ids), len(ids))
    return ids[:end]


def cut_at_text(ids: list[int], stop_strings: Sequence[str], tokenizer) -> list[int]:
    """Ids up to and including the token that completes a stop string."""

    def holds(position: int) -> bool:
        text = tokenizer.decode(ids[: position + 1])
        return any(stop in text for stop in stop_strings)

    return ids[: bisect.bisect_left(range(len(ids)), True, key=holds) + 1] if stop_strings else ids


def is_complete(ids: list[int], eos_ids: Sequence[int], stop_strings: Sequence[str] | None, tokenizer) -> bool:
    """Whether a response ended by itself, not at the length limit."""
    return ids[-1] in eos_ids or any(stop in tokenizer.decode(ids) for stop in stop_strings or ())


class Stops(StoppingCriteria):
    """Ends a response where it holds a stop string; the prompt does not count, nor what was told before."""

    def __init__(self, sampling: Sampling, width: int):
        self.sampling, self.width = sampling, width
        self.tail = max(map(len, sampling.stop_strings)) + 8  # tokens; one may hold less than a character

    def __call__(self, input_ids, scores, **options):
        start = max(self.width, input_ids.shape[1] - self.tail)
        texts = self.sampling.tokenizer.batch_decode(input_ids[:, start:])
        return torch.tensor([any(s in t for s in self.sampling.stop_strings) for t in texts], device=input_ids.device)


def generation_config(sampling: Sampling) -> GenerationConfig:
    """What transformers is asked for: the distribution at one temperature, or its most likely token."""
    warm: dict[str, Any] = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    warm |= {"do_sample": True, "min_p": sampling.min_p or None}
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(sampling.eos_ids),
        pad_token_id=sampling.pad_id,
        use_cache=True,
        repetition_penalty=sampling.repetition_penalty,
        **(warm if sampling.temperature > 0 else {"do_sample": False}),
    )


@contextmanager
def plain_generation(model, config):
    """The model in eval mode, without gradients, with `config` in place of its own generation defaults.

    A router's load is not balanced meanwhile: transformers would take the term of each new token over the whole mask.
    """
    own, training = model.generation_config, model.training
    configs = (model.config, model.config.get_text_config(decoder=True))
    routed = [some for some in configs if getattr(some, "output_router_logits", False)]
    model.generation_config = config
    model.eval()
    try:
        for some in routed:
            some.output_router_logits = False
        with torch.no_grad():
            yield
    finally:
        for some in routed:
            some.output_router_logits = True
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


def forward_is_collective(model: nn.Module) -> bool:
    """Whether a forward of this model needs every rank, for its weights lie in parts on all of them.

    Then all ranks must sample as often and as long as any of them.
    """
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule) or any(hasattr(p, "ds_id") for p in model.parameters())  # ds_id: ZeRO-3


def refuse_virtual_tokens(model: nn.Module) -> None:
    """Raises ValueError for an adapter that puts tokens of its own before the prompt."""
    for config in getattr(model, "peft_config", {}).values():
        if config.is_prompt_learning:
            raise ValueError(
                f"model must be adapted in its weights, got {config.peft_type.value}; its virtual tokens are no part "
                "of what is sampled: train a LoRA adapter, or call patch_model in a loop of your own."
            )
