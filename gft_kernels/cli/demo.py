"""`gft demo`: two trainings from scratch, small enough for a CPU: watch GFT raise a reward, and run on real text.

Each fits a small base model first (the same trainer with A = 1 and tau = 0, which is SFT) and then GFT-tunes it.
"""

from __future__ import annotations

import functools
import shutil
import time
from pathlib import Path

from gft_kernels.cli.train import summary
from gft_kernels.tasks import digit_sum, gsm8k, scratch
from gft_kernels.trainer import GFTConfig, GFTTrainer

SFT = {"advantages": "ones", "tau": 0.0, "num_demonstrations": 1, "num_generations": 0}
QUIET = {"save_strategy": "no", "dataloader_pin_memory": False, "use_cpu": True}


def demo(out: str, data: str | None = None, only: str | None = None) -> None:
    """Both trainings (or one), each with its summary; models, logs and plots lie in `out`.

    Raises: FileNotFoundError, RowError for `data` that is no GSM8K.
    """
    parts = {"digit-sum": digit_sum_demo, "gsm8k": functools.partial(gsm8k_demo, data=data)}
    for name, run in parts.items():
        if only in (None, name):
            directory = Path(out, name)
            shutil.rmtree(directory, ignore_errors=True)
            start = time.perf_counter()
            print(f"\n=== {name}", flush=True)
            run(directory)
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


def digit_sum_demo(directory: Path) -> None:
    """A policy that solves few sums, and how its reward rises within a minute of GFT."""
    tokenizer = scratch.character_tokenizer(digit_sum.ALPHABET)
    model = scratch.small_llama(tokenizer, width=64, layers=2, heads=4, context=64)
    held_out = digit_sum.records(128, seed=9)
    limits = {"max_completion_length": 34, "seed": 0}
    base = GFTConfig(
        output_dir=str(directory / "base"), max_steps=900, per_device_train_batch_size=48, learning_rate=4e-3,
        warmup_steps=50, lr_scheduler_type="cosine", logging_steps=150, token_metrics=False, log_completions_steps=0,
        **SFT, **QUIET, **limits,
    )  # fmt: skip
    fit_base(model, tokenizer, base, digit_sum.base_records(48 * 900))
    tuning = GFTConfig(
        output_dir=str(directory / "gft"), num_demonstrations=4, num_generations=4, tau=0.7, max_steps=80,
        per_device_train_batch_size=16, learning_rate=1e-3, warmup_steps=5, lr_scheduler_type="cosine",
        logging_steps=4, log_completions_steps=40, log_kl=True, per_device_eval_batch_size=128,
        eval_num_generations=4, eval_temperature=1.0, eval_on_start=True, eval_strategy="steps", eval_steps=20,
        **QUIET, **limits,
    )  # fmt: skip
    tune(model, tokenizer, tuning, digit_sum.records(256), held_out, [digit_sum.strict])


def gsm8k_demo(directory: Path, data: str | None) -> None:
    """Real text on a model far too small to solve it: held-out likelihood and form move, accuracy hardly."""
    train, held_out = gsm8k.read_rows(data, "train"), gsm8k.read_rows(data, "test")[:64]
    texts = [text for row in train for text in (row["prompt"], *row["demonstrations"])]
    tokenizer = scratch.byte_pair_tokenizer(texts, vocabulary_size=2048)
    model = scratch.small_llama(tokenizer, width=128, layers=3, heads=4, context=768)
    limits = {"max_completion_length": 224, "overlong": "drop", "seed": 0}
    base = GFTConfig(
        output_dir=str(directory / "base"), max_steps=150, per_device_train_batch_size=16, learning_rate=3e-3,
        warmup_steps=20, lr_scheduler_type="cosine", logging_steps=30, token_metrics=False, log_completions_steps=0,
        **SFT, **QUIET, **limits,
    )  # fmt: skip
    fit_base(model, tokenizer, base, train)
    tuning = GFTConfig(
        output_dir=str(directory / "gft"), num_demonstrations=2, num_generations=2, tau=0.7, max_steps=40,
        per_device_train_batch_size=4, learning_rate=5e-4, warmup_steps=5, logging_steps=2, log_completions_steps=20,
        log_kl=True, per_device_eval_batch_size=64, eval_on_start=True, eval_strategy="steps", eval_steps=20,
        reward_weights=[1.0, 0.2], **QUIET, **limits,
    )  # fmt: skip
    tune(model, tokenizer, tuning, train, held_out, ["last_number", gsm8k.has_final_line])


def fit_base(model, tokenizer, config, rows) -> None:
    size = sum(p.numel() for p in model.parameters())
    print(f"base model: {size / 1e6:.2f} M parameters, {config.max_steps} steps of SFT on {len(rows)} rows", flush=True)
    trainer = GFTTrainer(model, config, rows, None, tokenizer)
    trainer.train()
    trainer.save_model(config.output_dir)


def tune(model, tokenizer, config, rows, held_out, reward_funcs) -> None:
    given, sampled = config.num_demonstrations, config.num_generations
    print(f"GFT: groups of {given + sampled} = 1 expert + {given - 1} teacher + {sampled} sampled, tau {config.tau}")
    trainer = GFTTrainer(model, config, rows, held_out, tokenizer, reward_funcs=reward_funcs)
    trainer.train()
    trainer.save_model(config.output_dir)
    print(summary(config.output_dir), flush=True)
