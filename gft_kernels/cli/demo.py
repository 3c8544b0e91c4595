"""`gft demo`: a real language model that learns to extract, or a model from scratch; each in a few minutes on a CPU.

From scratch: a small base model is fitted first (the same trainer with A = 1 and tau = 0, which is SFT), then tuned.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch

from gft_kernels.cli import extraction_demo
from gft_kernels.cli.train import announce, summary
from gft_kernels.data import digit_sum, gsm8k, scratch
from gft_kernels.trainer import GFTConfig, GFTTrainer
from gft_kernels.trainer.logs import StepLines, say

TAKES = {"gsm8k": ("data",), "digit-sum": (), **dict.fromkeys(extraction_demo.TASKS, ("model", "seed"))}
Options = dict[str, Any]
SHARED: Options = {"save_strategy": "no", "lr_scheduler_type": "cosine", "use_cpu": True, "seed": 0}
SFT: Options = {"advantages": "ones", "tau": 0.0, "num_demonstrations": 1, "num_generations": 0, "token_metrics": False}
SFT |= {"log_completions_steps": 0, **SHARED}
GFT: Options = {"warmup_steps": 5, "log_kl": True, "eval_on_start": True, "eval_strategy": "steps", **SHARED}


def demo(out: str, part: str, **given: Any) -> str:
    """One training; its models, logs and plots lie in `out`. given: `data`, `model`, `seed`, or None.

    Returns: how long it took.
    Raises: ValueError for an option that the part does not take; FileNotFoundError, RowError for `data` that is no
    GSM8K.
    """
    options = {name: value for name, value in given.items() if value is not None}
    for name in options:
        if name not in TAKES[part]:
            parts = " or ".join(other for other, names in TAKES.items() if name in names)
            raise ValueError(f"--{name} must go with --only {parts}, got {part}; leave it out.")
    directory, start = Path(out, part), time.perf_counter()
    for run in ("base", *extraction_demo.METHODS):  # of an earlier demo; what else lies there is not ours
        shutil.rmtree(directory / run, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)  # what cannot be written is said before the data is made
    if part == "gsm8k":
        gsm8k_demo(directory, options.get("data"))
    elif part == "digit-sum":
        digit_sum_demo(directory)
    else:
        extraction_demo.run(directory, part, **options)
    return f"{part}: {time.perf_counter() - start:.0f} s"


def digit_sum_demo(directory: Path) -> None:
    """A policy that solves a third of the sums, and how its reward rises within a minute of GFT.

    One thread: the operations are so small that several threads mostly wait for each other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tokenizer = scratch.character_tokenizer(digit_sum.ALPHABET)
    model = scratch.small_gpt2(tokenizer, width=64, layers=2, heads=4, context=64)
    base: Options = {"max_steps": 1000, "per_device_train_batch_size": 32, "learning_rate": 4e-3, "warmup_steps": 50}
    base |= {"logging_steps": 200, "max_completion_length": 34}
    tuning: Options = {"num_demonstrations": 4, "num_generations": 4, "max_steps": 60, "logging_steps": 3}
    tuning |= {"per_device_train_batch_size": 16, "learning_rate": 1e-3}
    tuning |= {"log_completions_steps": 30, "max_completion_length": 34}
    tuning |= {"per_device_eval_batch_size": 128, "eval_num_generations": 4, "eval_temperature": 1.0, "eval_steps": 20}
    train(model, tokenizer, directory / "base", {**SFT, **base}, digit_sum.base_records(32 * 1000))
    rows = digit_sum.read_rows(), digit_sum.read_rows(split="test")
    train(model, tokenizer, directory / "gft", {**GFT, **tuning}, *rows, [digit_sum.strict])
    torch.set_num_threads(threads)


def gsm8k_demo(directory: Path, data: str | None) -> None:
    """Real text on a model far too small to solve it: held-out likelihood and form move, accuracy stays near 0."""
    rows, held_out = gsm8k.read_rows(data, "train"), gsm8k.read_rows(data, "test")[:64]
    texts = [text for row in rows for text in (row["prompt"], *row["demonstrations"])]
    tokenizer = scratch.byte_pair_tokenizer(texts, vocabulary_size=1024)
    model = scratch.small_llama(tokenizer, width=128, layers=2, heads=4, context=768)
    lengths: Options = {"max_completion_length": 224, "overlong": "drop"}
    base: Options = {"max_steps": 160, "per_device_train_batch_size": 8, "learning_rate": 3e-3, "warmup_steps": 20}
    base |= {**lengths, "logging_steps": 40}
    tuning: Options = {"num_demonstrations": 2, "num_generations": 2, "max_steps": 40, "per_device_train_batch_size": 4}
    tuning |= {"learning_rate": 5e-4, "logging_steps": 2, "log_completions_steps": 20, **lengths}
    tuning |= {"per_device_eval_batch_size": 64, "eval_steps": 20, "reward_weights": [1.0, 0.2]}
    train(model, tokenizer, directory / "base", {**SFT, **base}, rows)
    rewards = ["last_number", gsm8k.has_final_line]
    train(model, tokenizer, directory / "gft", {**GFT, **tuning}, rows, held_out, rewards)


def train(model, tokenizer, directory: Path, options: Options, rows, held_out=None, rewards=()) -> None:
    """One training of the model as it is; what was learnt is said where rows are held out."""
    config = GFTConfig(output_dir=str(directory), **options)
    trainer = GFTTrainer(model, config, rows, held_out, tokenizer, reward_funcs=rewards)
    StepLines.install(trainer)
    say(f"{directory.name}:")
    announce(trainer, None, [])
    trainer.train()
    trainer.save_model(config.output_dir)
    if held_out is not None:
        say(summary(str(config.output_dir)))
