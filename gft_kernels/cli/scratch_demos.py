"""Two trainings from scratch, small enough for a CPU: watch GFT raise a reward in a minute, and run on real text.

Each fits a small base model first (the same trainer with A = 1 and tau = 0, which is SFT) and then GFT-tunes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gft_kernels.cli.train import summary
from gft_kernels.data import digit_sum, gsm8k, scratch
from gft_kernels.trainer import GFTConfig, GFTTrainer
from gft_kernels.trainer.config import described
from gft_kernels.trainer.logs import StepLines

Options = dict[str, Any]
SHARED: Options = {"save_strategy": "no", "lr_scheduler_type": "cosine", "use_cpu": True, "seed": 0}
SFT: Options = {
    "advantages": "ones",
    "tau": 0.0,
    "num_demonstrations": 1,
    "num_generations": 0,
    "token_metrics": False,
    "log_completions_steps": 0,
    **SHARED,
}
GFT: Options = {"warmup_steps": 5, "log_kl": True, "eval_on_start": True, "eval_strategy": "steps", **SHARED}


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
    fit_base(model, tokenizer, directory, base, digit_sum.base_records(32 * 1000))
    tuning: Options = {"num_demonstrations": 4, "num_generations": 4, "max_steps": 60, "logging_steps": 3}
    tuning |= {"per_device_train_batch_size": 16, "learning_rate": 1e-3}
    tuning |= {"log_completions_steps": 30, "max_completion_length": 34}
    tuning |= {"per_device_eval_batch_size": 128, "eval_num_generations": 4, "eval_temperature": 1.0, "eval_steps": 20}
    rows = digit_sum.read_rows(), digit_sum.read_rows(split="test")
    tune(model, tokenizer, directory, tuning, *rows, [digit_sum.strict])
    torch.set_num_threads(threads)


def gsm8k_demo(directory: Path, data: str | None) -> None:
    """Real text on a model far too small to solve it: held-out likelihood and form move, accuracy stays near 0."""
    train, held_out = gsm8k.read_rows(data, "train"), gsm8k.read_rows(data, "test")[:64]
    texts = [text for row in train for text in (row["prompt"], *row["demonstrations"])]
    tokenizer = scratch.byte_pair_tokenizer(texts, vocabulary_size=1024)
    model = scratch.small_llama(tokenizer, width=128, layers=2, heads=4, context=768)
    lengths: Options = {"max_completion_length": 224, "overlong": "drop"}
    base: Options = {"max_steps": 160, "per_device_train_batch_size": 8, "learning_rate": 3e-3, "warmup_steps": 20}
    fit_base(model, tokenizer, directory, {**base, **lengths, "logging_steps": 40}, train)
    tuning: Options = {"num_demonstrations": 2, "num_generations": 2, "max_steps": 40, "per_device_train_batch_size": 4}
    tuning |= {"learning_rate": 5e-4, "logging_steps": 2, "log_completions_steps": 20, **lengths}
    tuning |= {"per_device_eval_batch_size": 64, "eval_steps": 20, "reward_weights": [1.0, 0.2]}
    tune(model, tokenizer, directory, tuning, train, held_out, ["last_number", gsm8k.has_final_line])


def fit_base(model, tokenizer, directory: Path, options: Options, rows) -> None:
    config = GFTConfig(output_dir=str(directory / "base"), **SFT, **options)
    size = sum(p.numel() for p in model.parameters())
    print(f"base model: {size / 1e6:.2f} M parameters, {config.max_steps} steps of SFT on {len(rows)} rows", flush=True)
    run(GFTTrainer(model, config, rows, None, tokenizer))


def tune(model, tokenizer, directory: Path, options: Options, rows, held_out, reward_funcs) -> None:
    config = GFTConfig(output_dir=str(directory / "gft"), **GFT, **options)
    given, sampled = config.num_demonstrations, config.num_generations
    print(f"GFT: groups of {given + sampled} = 1 expert + {given - 1} teacher + {sampled} sampled,", end=" ")
    print(described(config), flush=True)
    run(GFTTrainer(model, config, rows, held_out, tokenizer, reward_funcs=reward_funcs))
    print(summary(str(config.output_dir)), flush=True)


def run(trainer: GFTTrainer) -> None:
    StepLines.install(trainer)
    trainer.train()
    trainer.save_model(trainer.args.output_dir)
