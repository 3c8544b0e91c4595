"""The tasks of the studies: data, model from scratch, reward, sampling, and what a base model must not forget."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from benchmarks.experiments.rollouts import sample_gpt2
from benchmarks.experiments.scoring import demonstration, log_probs
from gft_kernels.data import digit_sum, gsm8k, scratch
from gft_kernels.data.text import decode
from gft_kernels.trainer import Sampling, generate

BASE, TRAIN, DEVELOPMENT, TEST, CURVE, GENERAL = range(6)  # what a stream of random numbers is for


def stream(purpose: int, number: int = 0) -> int:
    """A seed for data of one purpose: no two purposes share one."""
    return 1000 * number + purpose


class Task(Protocol):
    """What a study needs to know of its task."""

    tokenizer: Any
    demonstrations: int  # that a row offers; a method that asks for more takes these
    rewards: list[Callable]
    rollout: Callable

    def new_model(self, seed: int): ...

    def base_rows(self, base: int) -> list[dict]: ...

    def train_rows(self, expert: str, seed: int, times: int) -> list[dict]: ...

    def held_out(self, purpose: int, count: int, expert: str) -> list[dict]:
        """Rows of DEVELOPMENT, TEST or CURVE: nothing is trained on them."""
        ...

    def retention(self, model, count: int) -> float:
        """How well the model still does what the base model was fitted to beside the task; higher is better."""
        ...


@dataclass
class DigitSums:
    """Sums of digits modulo 10, worked out step by step; beside them copying, reversing, sorting and the like.

    styles: the mixture of solution styles the base model sees, with `noise` per step. rows: training prompts.
    """

    digits: int
    styles: dict[str, float]
    base_count: int
    rows: int
    noise: float = 0.1
    teacher_noise: float = 0.03
    width: int = 64
    layers: int = 2
    heads: int = 4
    context: int = 64
    demonstrations: int = 8
    rewards: list[Callable] = field(default_factory=lambda: [digit_sum.strict])
    rollout: Callable = sample_gpt2

    def __post_init__(self):
        self.tokenizer = scratch.character_tokenizer(digit_sum.ALPHABET)

    def new_model(self, seed: int):
        return scratch.small_gpt2(self.tokenizer, self.width, self.layers, self.heads, self.context, seed)

    def base_rows(self, base: int) -> list[dict]:
        return digit_sum.base_records(self.base_count, self.noise, stream(BASE, base), self.styles, self.digits)

    def train_rows(self, expert: str, seed: int, times: int) -> list[dict]:
        return self._records(self.rows * times, stream(TRAIN, seed), expert)

    def held_out(self, purpose: int, count: int, expert: str) -> list[dict]:
        return self._records(count, stream(purpose), expert)

    def _records(self, count, seed, expert):
        return digit_sum.records(count, self.teacher_noise, seed, expert, self.demonstrations - 1, self.digits)

    def retention(self, model, count: int) -> float:
        """Accuracy on the general tasks, greedy."""
        rng = random.Random(stream(GENERAL))
        pairs = [digit_sum.general_text(rng) for _ in range(count)]
        prompts = [self.tokenizer(prompt)["input_ids"] for prompt, _ in pairs]
        sampling = Sampling(1, 8, 0.0, (self.tokenizer.eos_token_id,), self.tokenizer.pad_token_id)
        texts = [decode(self.tokenizer, ids, sampling.eos_ids) for ids in self.rollout(model, prompts, sampling)]
        return sum(text == answer for text, (_, answer) in zip(texts, pairs, strict=True)) / count


@dataclass
class WordProblems:
    """GSM8K with a model from scratch, fitted to the training set's solutions, main and socratic.

    data: directory with train.parquet, test.parquet and socratic/, or None for the sample that ships.
    """

    data: str | None = None
    vocabulary: int = 4096
    width: int = 384
    layers: int = 8
    heads: int = 6
    context: int = 768
    demonstrations: int = 2
    rewards: list[Callable] = field(default_factory=lambda: ["last_number"])
    rollout: Callable = generate

    def __post_init__(self):
        self.train, self.test = gsm8k.read_rows(self.data, "train"), gsm8k.read_rows(self.data, "test")
        texts = (text for row in self.train for text in (row["prompt"], *row["demonstrations"]))
        self.tokenizer = scratch.byte_pair_tokenizer(texts, self.vocabulary)

    def new_model(self, seed: int):
        return scratch.small_llama(self.tokenizer, self.width, self.layers, self.heads, self.context, seed)

    def base_rows(self, base: int) -> list[dict]:
        return [{**row, "demonstrations": [text]} for row in self.train for text in row["demonstrations"]]

    def train_rows(self, expert: str, seed: int, times: int) -> list[dict]:
        return self.train

    def held_out(self, purpose: int, count: int, expert: str) -> list[dict]:
        start = {DEVELOPMENT: 0, CURVE: 0, TEST: len(self.test) // 4}[purpose]
        return self.test[start : start + count]

    def retention(self, model, count: int) -> float:
        """Nats per token of held-out socratic solutions, which the base was fitted to and the expert does not show."""
        groups = [demonstration(self.tokenizer, row, number=1) for row in self.test[:count]]
        return float(log_probs(model, groups).mean())


@dataclass
class Extraction:
    """A pretrained model by its name, and one of the ready tasks whose rows are made of values: a right answer each.

    records: the module of gft_kernels.data that makes them. Retention is how it still reads GSM8K's solutions.
    """

    model: str
    records: str
    reward: str
    rows: int
    demonstrations: int = 2
    rollout: Callable = generate

    def __post_init__(self):
        from transformers import AutoTokenizer

        self.rewards = [self.reward]
        self.made = importlib.import_module(f"gft_kernels.data.{self.records}").records
        self.path = importlib.import_module("gft_kernels.data.pretrained").located(self.model)
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)

    def new_model(self, seed: int):
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32)

    def base_rows(self, base: int) -> list[dict]:
        return []

    def train_rows(self, expert: str, seed: int, times: int) -> list[dict]:
        return self.made(self.rows * times, "train", stream(TRAIN, seed))

    def held_out(self, purpose: int, count: int, expert: str) -> list[dict]:
        return self.made(count, "test", stream(purpose))

    def retention(self, model, count: int) -> float:
        """Nats per token of solutions to school problems, which nothing here trains on."""
        groups = [demonstration(self.tokenizer, row) for row in gsm8k.read_rows(None, "test")[:count]]
        return float(log_probs(model, groups).mean())
