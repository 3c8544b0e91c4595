"""Which engine samples a run's responses."""

from __future__ import annotations

from collections.abc import Callable

from gft_kernels.trainer import continuous, vllm_rollouts
from gft_kernels.trainer.config import GFTConfig
from gft_kernels.trainer.rollouts import generate


def rollout_function(config: GFTConfig, model, given: Callable | None) -> Callable:
    """The one asked for; none stands in for another. Raises ValueError, with the reason, where it cannot serve."""
    if given is not None:
        if config.rollout != "auto":
            raise ValueError(f"rollout must be 'auto' with a rollout_fn, got {config.rollout!r}; one of them samples.")
        return given
    if config.rollout == "continuous":
        refuse(config, continuous.unusable(model))
        return continuous.generate_continuously
    if config.rollout == "vllm":
        refuse(config, vllm_rollouts.unusable(model))
        longest = None if config.max_prompt_length is None else config.max_prompt_length + config.max_completion_length
        dtype = "bfloat16" if config.bf16 else "float16" if config.fp16 else str(model.dtype).removeprefix("torch.")
        return vllm_rollouts.VLLMRollouts(config.vllm_memory, longest, dtype, config.world_size)
    return generate


def refuse(config: GFTConfig, reason: str | None) -> None:
    if reason is not None:
        raise ValueError(f"rollout must be one that can sample here, got {config.rollout!r}; {reason}.")
