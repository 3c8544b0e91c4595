"""Small callbacks: the metrics on disk, a readable line for each log call, and a checkpoint on Ctrl-C."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

METRICS_FILE = "metrics.jsonl"


class RunLog(TrainerCallback):
    """Appends every log line of the Trainer to metrics.jsonl in the output directory; `gft plot` reads it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            path = Path(args.output_dir, METRICS_FILE)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"step": state.global_step, **logs}) + "\n")


LINE = {
    "loss": "loss",
    "reward/expert": "expert",
    "reward/teacher": "teacher",
    "reward/sampled": "sampled",
    "reward/offline": "offline",
    "rectified": "rectified",
    "entropy": "entropy",
    "grad_norm": "gradient",
    "tokens_per_second": "tokens/s",
    "eval_reward": "held-out reward",
    "eval_expert_log_likelihood": "held-out expert log-likelihood",
}


class StepLines(ProgressCallback):
    """Trainer's progress bar, with one short line per log call instead of the whole dictionary."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = [f"{label} {logs[name]:.4g}" for name, label in LINE.items() if name in (logs or {})]
        if state.is_world_process_zero and shown:
            tqdm.write(f"step {state.global_step:>5}  " + "  ".join(shown))

    @classmethod
    def install(cls, trainer) -> None:
        """Takes the place of the callbacks that print dictionaries."""
        for other in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(other)
        trainer.add_callback(cls)


class SaveOnInterrupt(TrainerCallback):
    """The first Ctrl-C finishes the step, saves a checkpoint and stops; the second stops at once.

    Works in the main thread only, where signals arrive. `interrupted` tells afterwards what happened.
    """

    def __init__(self):
        self.interrupted = False
        self._before = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._before = signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number, frame):
        self.interrupted = True
        self._restore()
        print("\nfinishing this step, then saving; press Ctrl-C again to stop at once", file=sys.stderr, flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:  # signals reach ranks at different times, but all must stop after the same step
            flag = torch.tensor(int(self.interrupted), device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            self.interrupted = bool(flag.item())
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self._restore()

    def _restore(self):
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None


def read_metrics(run: str | Path) -> list[dict]:
    """The log lines of a run in step order; where a resumed run logged a step again, the later line counts.

    Raises: FileNotFoundError if the directory holds no metrics.jsonl.
    """
    path = Path(run, METRICS_FILE)
    if not path.is_file():
        raise FileNotFoundError(f"run must be a directory with {METRICS_FILE}, got {str(run)!r}; train there first.")
    lines: dict[tuple, dict] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        kind = "eval" if any(key.startswith("eval_") for key in line) else "end" if "train_runtime" in line else "train"
        lines[line["step"], kind] = line
    return [lines[key] for key in sorted(lines)]
