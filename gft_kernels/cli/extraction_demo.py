"""A pretrained language model learns to extract: by GFT, and by SFT on the same demonstrations for as many steps.

Half of the demonstrations are wrong. Both are asked about the same held-out rows before and after, and one screen says
what came of it.
"""

from __future__ import annotations

import gc
import json
import resource
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, ProgressCallback, TrainerCallback

from gft_kernels.cli.held_out import TEMPERATURES, draw, screen
from gft_kernels.data import dates, extract_json, pretrained
from gft_kernels.data.manifests import read_manifest
from gft_kernels.trainer import GFTConfig, GFTTrainer
from gft_kernels.trainer.logs import say, time_left

TASKS: dict[str, tuple[Any, str, str]] = {
    "dates": (dates, "exact_answer", "the date of a sentence as YYYY-MM-DD"),
    "json": (extract_json, "json_answer", "name, age and city of a sentence as a JSON object"),
}
TASK = "dates"  # of the demo: short answers, so that most of its minutes are training
# examples/dates.yaml and examples/extract_json.yaml are these runs.
SHARED: dict[str, Any] = {
    "num_demonstrations": 2, "max_completion_length": 32, "per_device_train_batch_size": 4, "max_steps": 8,
    "learning_rate": 3e-5, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3, "logging_steps": 1,
    "per_device_eval_batch_size": 64, "eval_temperature": [1.0, 0.0], "save_strategy": "no", "use_cpu": True,
    "log_completions_steps": 0,
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "gft": {"num_generations": 4, "tau": 0.7},
    "sft": {"num_generations": 0, "advantages": "ones", "tau": 0.0},
}
SHOWN = 3  # held-out rows whose completions are put side by side


@dataclass
class Remaining:
    """The time left of a run, told from what the parts done so far took. Parts are counted in responses."""

    total: float
    done: float = 0.0
    begun: float = field(default_factory=lambda: time.perf_counter())

    def after(self, responses: float) -> str:
        self.done += responses
        return time_left((time.perf_counter() - self.begun) * (self.total - self.done) / self.done)


class Lines(TrainerCallback):
    """A line a step, in place of bars and dictionaries."""

    def __init__(self, method: str, responses: int, remaining: Remaining):
        self.method, self.responses, self.remaining = method, responses, remaining

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            right = f", {logs['reward/sampled']:.2f} of its samples right" if "reward/sampled" in logs else ""
            left = self.remaining.after(self.responses)
            say(f"{self.method.upper()} step {state.global_step} of {state.max_steps}{right}; {left}")


def run(directory: Path, task: str, model: str = "smollm2", seed: int = 0, **changes: Any) -> dict[str, Any]:
    """Trains both, prints the screen, and returns what `result.json` holds. changes: to SHARED, as of a shorter run.

    Raises: ValueError for a model that is not on this machine.
    """
    folder = pretrained.located(model)
    warnings.filterwarnings("ignore", category=FutureWarning)
    with pretrained.transformers_at_rest():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        result: dict[str, Any] = {"task": task, "about": TASKS[task][2], "model": name_of(folder), "seed": seed}
        result["methods"] = {}
        remaining = None
        for method in METHODS:
            options = {"seed": seed, **changes, **METHODS[method]}
            trainer = trainer_of(folder, tokenizer, directory / method, task, options)
            remaining = remaining or Remaining(responses_of(trainer))
            trainer.add_callback(Lines(method, step_responses(trainer.args), remaining))
            if method == "gft":
                result |= facts(trainer)
                say(f"{result['parameters'] / 1e6:.1f} M parameters; {result['n']} held-out rows before training")
                result["before"] = held_out(trainer, remaining)
            result["methods"][method] = tuned(trainer, remaining)
            if method == "gft":
                trainer.save_model(str(directory / method))
            del trainer
            gc.collect()
    result["peak_gib"] = peak_gib()
    (directory / "result.json").write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    plot = draw(result, directory / "held-out.png")
    say("\n" + screen(result) + f"\nplot   {plot}\nmodel  {directory / 'gft'}\n")
    return result


def peak_gib() -> float:
    """The most memory this process has had so far."""
    unit = 1 << 30 if sys.platform == "darwin" else 1 << 20  # of ru_maxrss: bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def trainer_of(folder: str, tokenizer, directory: Path, task: str, options: dict[str, Any]) -> GFTTrainer:
    """The trainer of one method, with fresh weights and without host libraries' lines."""
    rows, reward, _ = TASKS[task]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    args = GFTConfig(output_dir=str(directory), disable_tqdm=True, report_to="none", **{**SHARED, **options})
    held_out = rows.read_rows(split="test")[: args.per_device_eval_batch_size]
    trainer = GFTTrainer(model, args, rows.read_rows(), held_out, tokenizer, reward_funcs=reward)
    for other in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(other)
    return trainer


def name_of(folder: str) -> str:
    """A model's name: of a converted file, the file's."""
    return (read_manifest(Path(folder)) or {}).get("source", Path(folder).name).removesuffix(".gguf")


def facts(trainer: GFTTrainer) -> dict[str, Any]:
    rows: Any = trainer.eval_dataset
    asked = [rows[i].prompt[-1]["content"] for i in range(min(SHOWN, len(rows)))]
    model: Any = trainer.model
    size = sum(p.numel() for p in model.parameters())
    return {"n": len(rows), "steps": trainer.args.max_steps, "parameters": size, "asked": asked}


def tuned(trainer: GFTTrainer, remaining: Remaining) -> dict[str, Any]:
    """A training and what the model says then; seconds a step, and those of them that sampling took."""
    begun, sampled = time.perf_counter(), trainer.rollout.spent[1]
    trainer.train()
    seconds, steps = time.perf_counter() - begun, trainer.state.max_steps
    sampling = (trainer.rollout.spent[1] - sampled) / steps
    return {"seconds_a_step": seconds / steps, "sampling_a_step": sampling, **held_out(trainer, remaining)}


def held_out(trainer: GFTTrainer, remaining: Remaining) -> dict[str, Any]:
    """The rate of right answers at each temperature, and the first rows' completions at T = 1."""
    metrics = trainer.evaluate()
    rows: Any = trainer.eval_dataset
    first = [rows[i] for i in range(min(SHOWN, len(rows)))]
    sampled = trainer.builder.sample(trainer.model, first, 1, 1.0, (trainer.args.seed,))
    say(f"held out: {metrics['eval_reward']:.2f} right at T = 1; {remaining.after(evaluation_responses(trainer))}")
    return {
        "right": {name: metrics[key] for name, key in TEMPERATURES.items()},
        "completions": [responses[0].text for responses in sampled],
    }


# How long a run takes: a response trained on takes about as long as one sampled.


def step_responses(args: GFTConfig) -> int:
    return args.per_device_train_batch_size * (args.num_demonstrations + 2 * args.num_generations)


def evaluation_responses(trainer: GFTTrainer) -> int:
    return len(trainer.eval_dataset) * len(trainer.args.eval_temperatures) + SHOWN  # type: ignore[arg-type]


def responses_of(trainer: GFTTrainer) -> int:
    """Of the whole run: three evaluations, and the steps of either method."""
    sft = trainer.args.per_device_train_batch_size * trainer.args.num_demonstrations
    return 3 * evaluation_responses(trainer) + trainer.args.max_steps * (step_responses(trainer.args) + sft)
