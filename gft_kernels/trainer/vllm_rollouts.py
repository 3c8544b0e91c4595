"""Rollouts by vLLM in the training process (colocated): an engine beside the model, given its weights before each one.

Not yet run: it needs a GPU. What it asks of vLLM's classes is tested against stand-ins with their signatures.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gft_kernels.model.patch import unwrapped
from gft_kernels.trainer.rollouts import Sampling, cut


def unusable(model) -> str | None:
    """Why this machine or this model cannot sample so, or None."""
    if importlib.util.find_spec("vllm") is None:
        return "vllm is not installed: pip install 'gft-kernels[vllm]'"
    if not torch.cuda.is_available():
        return "vLLM needs a GPU, and PyTorch sees none"
    if hasattr(model, "peft_config"):
        return "the model has adapters; merge them, or sample with 'generate'"
    if not getattr(model, "name_or_path", ""):
        return "the model must come from a directory or a hub, for vLLM builds its own from there"
    return None


class VLLMRollouts:
    """A rollout function. The engine starts with the first call; its share of GPU memory is `memory`, in (0, 1)."""

    def __init__(self, memory: float, longest: int | None, dtype: str = "auto", ranks: int = 1):
        self.memory, self.longest, self.dtype, self.ranks = memory, longest, dtype, ranks
        self.engine: Any = None

    def __call__(self, model, prompts_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        from vllm import SamplingParams

        if self.engine is None:
            self.engine = self._start(model)
        self._load(named_weights(model))
        # The plain distribution at one temperature: what else vLLM would take from the model's own defaults is set.
        parameters = SamplingParams(
            n=sampling.num_generations,
            temperature=sampling.temperature,
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            repetition_penalty=1.0,
            max_tokens=sampling.max_new_tokens,
            stop_token_ids=list(sampling.eos_ids),
            seed=int(torch.randint(2**31, ())),  # from the rollout's own stream
            detokenize=False,
        )
        prompts = [{"prompt_token_ids": list(ids)} for ids in prompts_ids]
        answers = self.engine.generate(prompts, sampling_params=parameters, use_tqdm=False)
        return [cut(list(output.token_ids), sampling.eos_ids) for answer in answers for output in answer.outputs]

    def _start(self, model):
        from vllm import LLM

        # Under torchrun every rank has an engine of its own, which must not start processes.
        launched = {"distributed_executor_backend": "external_launcher"} if self.ranks > 1 else {}
        return LLM(
            model=model.name_or_path,
            dtype=self.dtype,
            tensor_parallel_size=1,
            gpu_memory_utilization=self.memory,
            max_model_len=self.longest,
            **launched,
        )

    def _load(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """The policy's weights as they are now, one at a time; what the engine remembers of the old ones is dropped."""
        worker = self.engine.llm_engine.model_executor.driver_worker
        for named in weights:
            worker.model_runner.model.load_weights([named])
        self.engine.reset_prefix_cache()


def named_weights(model) -> Iterator[tuple[str, Tensor]]:
    """Every weight under its own name, whole: all ranks must walk together where it lies in parts (FSDP2).

    Raises ValueError for ZeRO-3.
    """
    for name, parameter in unwrapped(model).named_parameters():
        if hasattr(parameter, "ds_id"):
            raise ValueError("rollout must be 'generate' with DeepSpeed ZeRO-3, got 'vllm'; or use FSDP2 or ZeRO-2.")
        value = parameter.detach()
        yield name, value.full_tensor() if hasattr(value, "full_tensor") else value
