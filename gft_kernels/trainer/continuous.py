"""Rollouts by transformers' continuous batching: a response that ends makes room for the next one at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import transformers

from gft_kernels.trainer.ranks import forward_is_collective
from gft_kernels.trainer.rollouts import Sampling, cut, generation_config, plain_generation

PAGE = 16  # tokens of a cache block on a CPU, where the default would take most of the memory and seconds to clear it


def unusable(model) -> str | None:
    """Why this model cannot be sampled from so, or None."""
    config = getattr(transformers, "ContinuousBatchingConfig", None)
    fields = {field.name for field in dataclasses.fields(config)} if config is not None else set()
    if not {"page_size", "num_blocks", "seed"} <= fields or not hasattr(model, "generate_batch"):
        return f"transformers {transformers.__version__} has no continuous batching for it; 5.23 has"
    return None


def generate_continuously(model, prompts_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    """As `rollouts.generate`, by `model.generate_batch`.

    Raises: ValueError where the weights lie in parts, RuntimeError for a lost request.
    """
    if forward_is_collective(model):
        raise ValueError("rollout must be 'generate' where the weights lie in parts on all ranks, got 'continuous'.")
    requests = [list(ids) for ids in prompts_ids for _ in range(sampling.num_generations)]
    config = generation_config(sampling)
    with plain_generation(model, config):
        found = model.generate_batch(
            requests, generation_config=config, continuous_batching_config=_batching(model, requests, sampling)
        )
    ended = [result for result in found.values() if result.error is None and len(result.generated_tokens) > 0]
    if len(ended) != len(requests):
        raise RuntimeError(
            f"continuous batching must answer {len(requests)} requests, got {len(ended)}; see its log, "
            "or set rollout to 'generate'"
        )
    return [cut(list(result.generated_tokens), sampling.eos_ids) for result in ended]


def _batching(model, requests, sampling):
    seed = int(torch.randint(2**31, ()))  # from the rollout's own stream
    if model.device.type != "cpu":
        return transformers.ContinuousBatchingConfig(seed=seed)
    blocks = sum(-(-(len(ids) + sampling.max_new_tokens) // PAGE) for ids in requests)
    longest = max(map(len, requests))
    return transformers.ContinuousBatchingConfig(
        seed=seed, page_size=PAGE, num_blocks=blocks + 1, max_batch_tokens=max(longest, 256), use_cuda_graph=False
    )
