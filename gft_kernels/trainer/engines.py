"""Which engine samples a run's responses, and those beside `rollouts.generate`.

- continuous: transformers' continuous batching; a response that ends makes room for the next one at once.
- vLLM in the training process (colocated): an engine beside the model, given its weights before each rollout. Not yet
  run: it needs a GPU. What it asks of vLLM's classes is tested against stand-ins with their signatures.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from gft_kernels.model.patch import unwrapped
from gft_kernels.trainer.config import GFTConfig
from gft_kernels.trainer.rollouts import (
    Sampling,
    cut,
    cut_at_text,
    forward_is_collective,
    generate,
    generation_config,
    plain_generation,
)

SHAPING = ("top_p", "top_k", "min_p", "repetition_penalty", "stop_strings")
PAGE = 16  # tokens of a cache block on a CPU, where the default would take most of the memory and seconds to clear it


class Rollout:
    """A run's rollout function: an engine that is asked for the run's distribution, and whose answers are checked.

    `spent`: the tokens sampled on this rank so far, and the seconds it took.
    """

    def __init__(self, config: GFTConfig, model, given: Callable | None, tokenizer, share_prompts: bool = False):
        self.engine = engine_of(config, model, given)
        self.shape = {name: getattr(config, name) for name in SHAPING}
        self.shape |= {"tokenizer": tokenizer, "share_prompts": share_prompts}
        self.shape["stop_strings"] = tuple(config.stop_strings or ())
        self.vocabulary = model.config.get_text_config(decoder=True).vocab_size
        self.spent = (0, 0.0)

    def __call__(self, model, prompts_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        """Raises ValueError for what is not so many responses of the model's tokens, RuntimeError where it exits."""
        begun, sampling = time.perf_counter(), dataclasses.replace(sampling, **self.shape)
        try:
            answers = [self._checked(ids) for ids in self.engine(model, prompts_ids, sampling)]
        except SystemExit as error:  # it would end the run with its own exit code
            raise RuntimeError(f"rollout_fn must return token ids, got SystemExit({error.code})") from error
        expected = len(prompts_ids) * sampling.num_generations
        if len(answers) != expected or not all(answers):
            raise ValueError(
                f"rollout_fn must return {expected} non-empty lists of token ids, got {len(answers)} "
                f"of which {answers.count([])} empty."
            )
        answers = [cut_at_text(ids, sampling.stop_strings, sampling.tokenizer) for ids in answers]
        tokens, seconds = self.spent
        self.spent = (tokens + sum(map(len, answers)), seconds + time.perf_counter() - begun)
        return answers

    def _checked(self, ids) -> list[int]:
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        try:
            known = [operator.index(token) for token in ids]
        except TypeError:
            raise ValueError(f"rollout_fn must return lists of token ids, got {ids!r} among them.") from None
        for token in known:
            if not 0 <= token < self.vocabulary:
                raise ValueError(
                    f"rollout_fn must return token ids in [0, {self.vocabulary}), got {token}; "
                    "it samples from another vocabulary than the model's."
                )
        return known


def engine_of(config: GFTConfig, model, given: Callable | None) -> Callable:
    """The one asked for; none stands in for another. Raises ValueError, with the reason, where it cannot serve."""
    if given is not None and config.rollout != "auto":
        raise ValueError(f"rollout must be 'auto' with a rollout_fn, got {config.rollout!r}; one of them samples.")
    if config.rollout not in UNUSABLE:
        return given or generate
    reason = UNUSABLE[config.rollout](model)
    if reason is not None:
        raise ValueError(f"rollout must be one that can sample here, got {config.rollout!r}; {reason}.")
    if config.rollout == "continuous":
        return generate_continuously
    longest = None if config.max_prompt_length is None else config.max_prompt_length + config.max_completion_length
    dtype = "bfloat16" if config.bf16 else "float16" if config.fp16 else str(model.dtype).removeprefix("torch.")
    return VLLMRollouts(config.vllm_memory, longest, dtype, config.world_size)


def no_continuous(model) -> str | None:
    """Why continuous batching cannot sample from this model, or None."""
    config = getattr(transformers, "ContinuousBatchingConfig", None)
    fields = {field.name for field in dataclasses.fields(config)} if config is not None else set()
    if not {"page_size", "num_blocks", "seed"} <= fields or not hasattr(model, "generate_batch"):
        return f"transformers {transformers.__version__} has no continuous batching for it; 5.23 has"
    return None


def no_vllm(model) -> str | None:
    """Why vLLM cannot sample on this machine or from this model, or None."""
    if importlib.util.find_spec("vllm") is None:
        return "vllm is not installed: pip install 'gft-kernels[vllm]'"
    if not torch.cuda.is_available():
        return "vLLM needs a GPU, and PyTorch sees none"
    if hasattr(model, "peft_config"):
        return "the model has adapters; merge them, or sample with 'generate'"
    if not getattr(model, "name_or_path", ""):
        return "the model must come from a directory or a hub, for vLLM builds its own from there"
    return None


UNUSABLE: dict[str, Callable[[Any], str | None]] = {"continuous": no_continuous, "vllm": no_vllm}


def generate_continuously(model, prompts_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    """As `rollouts.generate`, by `model.generate_batch`.

    Raises: ValueError where the weights lie in parts, RuntimeError for a lost request.
    """
    if forward_is_collective(model):
        raise ValueError("rollout must be 'generate' where the weights lie in parts on all ranks, got 'continuous'.")
    requests = [list(ids) for ids in prompts_ids for _ in range(sampling.num_generations)]
    config = generation_config(sampling)
    options: dict[str, Any] = {"seed": int(torch.randint(2**31, ()))}  # from the rollout's own stream
    if model.device.type == "cpu":
        blocks = sum(-(-(len(ids) + sampling.max_new_tokens) // PAGE) for ids in requests)
        longest = max(map(len, requests))
        options |= {"page_size": PAGE, "num_blocks": blocks + 1, "max_batch_tokens": max(longest, 256)}
        options["use_cuda_graph"] = False
    batching = transformers.ContinuousBatchingConfig(**options)
    with plain_generation(model, config):
        found = model.generate_batch(requests, generation_config=config, continuous_batching_config=batching)
    ended = [result for result in found.values() if result.error is None and len(result.generated_tokens) > 0]
    if len(ended) != len(requests):
        raise RuntimeError(
            f"continuous batching must answer {len(requests)} requests, got {len(ended)}; see its log, "
            "or set rollout to 'generate'"
        )
    return [cut(list(result.generated_tokens), sampling.eos_ids) for result in ended]


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
        # What vLLM would take from the model's own defaults is set.
        parameters = SamplingParams(
            n=sampling.num_generations,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            max_tokens=sampling.max_new_tokens,
            stop_token_ids=list(sampling.eos_ids),
            seed=int(torch.randint(2**31, ())),  # from the rollout's own stream
            stop=list(sampling.stop_strings),
            detokenize=bool(sampling.stop_strings),
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
