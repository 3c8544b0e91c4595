"""GFT with TRL's trainers: a small model is fitted to worked sums by SFTTrainer, then tuned in groups by GRPOTrainer.

    pip install 'gft-kernels[trl]'
    python examples/integrations/trl_digit_sums.py

The task is the sum of five digits (gft_kernels.data.digit_sum), about a minute on one core of a CPU. A group is the
expert's solution, three teachers' and four samples of the policy; printed last is the share of right samples for
prompts the policy has not seen.
"""

from __future__ import annotations

import argparse
import tempfile

from datasets import Dataset, disable_progress_bars
from transformers import PrinterCallback, Trainer, TrainerCallback

from gft_kernels.data import digit_sum, scratch
from gft_kernels.integrations.trl import GFTGRPOConfig, GFTGRPOTrainer, GFTSFTConfig, GFTSFTTrainer

SHARED = {
    "lr_scheduler_type": "cosine",
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
    "seed": 0,
    "report_to": "none",
}

SHOWN = ("loss", "reward", "pi", "rectified", "entropy", "eval_reward")


class Lines(TrainerCallback):
    """A short line per log call."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        found = [f"{name} {float(logs[name]):.4f}" for name in SHOWN if name in (logs or {})]
        if found:
            print(f"step {state.global_step:5}", *found, sep="  ", flush=True)


def with_short_lines(trainer: Trainer) -> Trainer:
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Lines)
    return trainer


def fit(model, tokenizer, folder: str, steps: int, tau: float) -> None:
    """SFT (tau 0) or DFT (tau 1) on worked sums in mixed styles, a tenth of their steps wrong."""
    rows = digit_sum.base_records(32 * steps)
    texts = [{"prompt": row["prompt"], "completion": row["demonstrations"][0]} for row in rows]
    args = GFTSFTConfig(
        folder,
        tau=tau,
        max_steps=steps,
        per_device_train_batch_size=32,
        learning_rate=4e-3,
        warmup_steps=50,
        logging_steps=max(steps // 5, 1),
        **SHARED,
    )
    trainer = GFTSFTTrainer(model, args, train_dataset=Dataset.from_list(texts), processing_class=tokenizer)
    with_short_lines(trainer).train()


def tune(model, tokenizer, folder: str, steps: int) -> None:
    args = GFTGRPOConfig(
        folder,
        num_generations=8,  # a group,
        num_demonstrations=4,  # of which four are given
        max_completion_length=34,
        per_device_train_batch_size=128,
        learning_rate=1e-3,
        warmup_steps=5,
        max_steps=steps,
        logging_steps=max(steps // 12, 1),
        num_generations_eval=4,
        per_device_eval_batch_size=128,
        **SHARED,
    )
    trainer = GFTGRPOTrainer(
        model,
        digit_sum.strict,
        args,
        train_dataset=Dataset.from_list(digit_sum.read_rows()),
        eval_dataset=Dataset.from_list(digit_sum.read_rows(split="test")),
        processing_class=tokenizer,
    )
    with_short_lines(trainer)
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    after = trainer.evaluate()["eval_reward"]
    print(f"held-out reward {before:.3f} before, {after:.3f} after {steps} steps", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sft-steps", type=int, default=1000)
    parser.add_argument("--sft-tau", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    disable_progress_bars()
    tokenizer = scratch.character_tokenizer(digit_sum.ALPHABET)
    model = scratch.small_gpt2(tokenizer, width=64, layers=2, heads=4, context=64)
    with tempfile.TemporaryDirectory() as folder:
        fit(model, tokenizer, folder, options.sft_steps, options.sft_tau)
        tune(model, tokenizer, folder, options.steps)


if __name__ == "__main__":
    main()
