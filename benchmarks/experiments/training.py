"""One stage of training through GFTTrainer, and what is kept of it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

from transformers import PrinterCallback

from benchmarks.harness import quantile
from gft_kernels.trainer import GFTConfig, GFTTrainer

QUIET: dict[str, Any] = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "log_completions_steps": 0}
EVALUATING: dict[str, Any] = {"eval_on_start": True, "eval_strategy": "steps", "eval_temperature": 1.0}
AVERAGED = ("reward/sampled", "entropy", "rectified", "zero_std_groups")
QUANTILES = 10
"""Gradient norms are kept as their 0, 1/10, …, 10/10 quantiles over the steps."""


@dataclass
class Stage:
    """Everything that decides a stage beside the model it starts from."""

    options: dict
    rows: list[dict]
    curve_rows: list[dict] | None
    seed: int
    device: str


def train(model, task, stage: Stage) -> tuple[list[dict], dict[str, int]]:
    """Trains the model in place; the Trainer's log lines, one a step, and the tokens generated and trained on."""
    options = {**QUIET, **(EVALUATING if stage.curve_rows else {}), **stage.options}
    with tempfile.TemporaryDirectory(prefix="gft-study-", ignore_cleanup_errors=True) as directory:
        config = GFTConfig(output_dir=directory, seed=stage.seed, use_cpu=stage.device == "cpu", **options)
        rows = stage.rows, stage.curve_rows
        trainer = GFTTrainer(model, config, *rows, task.tokenizer, task.rewards, rollout_fn=task.rollout)
        trainer.remove_callback(PrinterCallback)
        tokens = _count_tokens(trainer.builder)
        trainer.train()
        return trainer.state.log_history, tokens


def _count_tokens(builder) -> dict[str, int]:
    """Counts the response tokens of every group that the builder makes from now on; evaluation makes none."""
    tokens, build = {"generated": 0, "trained": 0}, builder.build

    def counted(*arguments):
        groups = build(*arguments)
        for response in (r for group in groups for r in group.responses):
            tokens["trained"] += len(response.ids)
            tokens["generated"] += len(response.ids) * (response.source == "sampled")
        return groups

    builder.build = counted
    return tokens


def summary(history: list[dict], tokens: dict[str, int]) -> dict:
    """The compact record of a stage: quantiles of the gradient norm, means of what is logged, the held-out curve."""
    steps = [line for line in history if "loss" in line]
    held_out = [line for line in history if "eval_runtime" in line]
    norms = [line["grad_norm"] for line in steps]
    return {
        "tokens": tokens,
        "grad_norm": [rounded(quantile(norms, i / QUANTILES)) for i in range(QUANTILES + 1)],
        "means": {
            name: rounded(sum(line[name] for line in steps) / len(steps))
            for name in AVERAGED if all(name in line for line in steps)
        },
        "held_out": {
            "step": [line["step"] for line in held_out],
            "eval_reward": [rounded(line["eval_reward"]) for line in held_out],
        },
    }  # fmt: skip


def rounded(value):
    """A number, or each of a dictionary, to 4 significant digits: raw results stay small, and standard errors are far
    larger. Lists, which are counts, stay."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    return value if isinstance(value, list) else float(f"{value:.4g}")
