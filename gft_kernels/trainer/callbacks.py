"""Small callbacks: the metrics on disk, a readable line for each log call, and a checkpoint before a signal's end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

METRICS_FILE = "metrics.jsonl"


def say(text: str, file=None, write=print) -> None:
    """Prints what the console can show, the rest as escapes; neither its encoding nor its end stops a training."""
    file = sys.stdout if file is None else file
    encoding = getattr(file, "encoding", None) or "utf-8"
    with contextlib.suppress(OSError, ValueError):  # a terminal that hung up, a full disk, a closed stream
        write(text.encode(encoding, "backslashreplace").decode(encoding), file=file)
        file.flush()


def let_go_of_lost_terminal() -> None:
    """What a terminal that hung up cannot show goes nowhere: whoever writes there fails, a bar of transformers too."""
    for number in (1, 2):
        try:
            os.write(number, b"")
        except OSError:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), number)


class RunLog(TrainerCallback):
    """Appends every log line of the Trainer to metrics.jsonl in the output directory; `gft plot` reads it.

    A run that does not say how often it logs has ten lines at least, if it has ten steps.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        if getattr(args, "few_log_lines", False):
            state.logging_steps = max(1, min(int(args.logging_steps), state.max_steps // 10))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            path = Path(args.output_dir, METRICS_FILE)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a+b") as lines:
                if lines.tell() and (lines.seek(-1, 2), lines.read())[1] != b"\n":
                    lines.write(b"\n")  # half a line, of a run that was killed: ours is not to continue it
                lines.write((json.dumps({"step": state.global_step, **logs}) + "\n").encode())


LINE = {
    "loss": "loss",
    "reward/expert": "expert",
    "reward/teacher": "teacher",
    "reward/sampled": "sampled",
    "reward/offline": "offline",
    "rectified": "rectified",
    "entropy": "entropy",
    "grad_norm": "gradient",
    "tokens_per_second/sampling": "sampled/s",
    "tokens_per_second/training": "trained/s",
    "eval_reward": "held-out reward",
    "eval_reward_greedy": "greedy",
    "eval_expert_log_likelihood": "held-out expert log-likelihood",
}


class StepLines(TrainerCallback):
    """One short line per log call instead of the whole dictionary, with the time left."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun, self.first = time.perf_counter(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = [f"{label} {logs[name]:.4g}" for name, label in LINE.items() if name in (logs or {})]
        done, todo = state.global_step - getattr(self, "first", 0), state.max_steps - state.global_step
        if shown and "loss" in logs and done and todo > 0:
            shown.append(time_left((time.perf_counter() - self.begun) / done * todo))
        if state.is_world_process_zero and shown:
            say(f"step {state.global_step:>5}  " + "  ".join(shown), write=tqdm.write)

    @classmethod
    def install(cls, trainer) -> None:
        """Takes the place of the callbacks that print dictionaries; a bar is drawn on a terminal only."""
        for other in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(other)
        if sys.stderr.isatty() and not trainer.args.disable_tqdm:
            trainer.add_callback(Bar)
        trainer.add_callback(cls)


class Bar(ProgressCallback):
    """Trainer's progress bars without its dictionaries."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass


def time_left(seconds: float) -> str:
    return f"about {max(seconds, 0) / 60:.0f} min left" if seconds > 90 else f"about {max(seconds, 0):.0f} s left"


SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class SaveOnInterrupt(TrainerCallback):
    """Ctrl-C, SIGTERM or SIGHUP finishes the step, saves a checkpoint and stops; the same once more stops at once.

    Works in the main thread only, where signals arrive. `interrupted` tells afterwards what happened. As a context
    manager (`with stop: trainer.train()`) it gives the signals back even when training raises; GFTTrainer does that.
    """

    def __init__(self):
        self.interrupted = False
        self._before = {}

    def on_train_begin(self, args, state, control, **kwargs):
        for number in SIGNALS:
            ignored = signal.getsignal(number) is signal.SIG_IGN  # nohup: the run is to outlive its terminal
            if number not in self._before and not (ignored and number != signal.SIGINT):
                self._before[number] = signal.signal(number, self._on_signal) or signal.SIG_DFL

    def _on_signal(self, number, frame):
        # Only this signal is given back: a launcher answers Ctrl-C by a SIGTERM to its ranks.
        signal.signal(number, self._before.pop(number))
        if not self.interrupted:
            again = "press Ctrl-C again" if number == signal.SIGINT else "send the signal again"
            say(f"\nfinishing this step, then saving; {again} to stop at once", sys.stderr)
        self.interrupted = True

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:  # signals reach ranks at different times, but all must stop after the same step
            flag = torch.tensor(int(self.interrupted), device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            self.interrupted = bool(flag.item())
        if self.interrupted:
            control.should_save = control.should_training_stop = True
        let_go_of_lost_terminal()

    def on_train_end(self, args, state, control, **kwargs):
        self.restore()

    def restore(self) -> None:
        """The signals mean again what they meant before training."""
        while self._before:
            signal.signal(*self._before.popitem())

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self.restore()


def read_metrics(run: str | Path) -> list[dict]:
    """The log lines of a run in step order; where a resumed run logged a step again, the later line counts.

    Each time it ended it says how long it took, at the same step too if it was resumed with none left.
    Lines cut short by a crash or a full disk are left out, with a warning.
    Raises: FileNotFoundError if the directory holds no metrics.jsonl.
    """
    path = Path(run, METRICS_FILE)
    if not path.is_file():
        raise FileNotFoundError(f"run must be a directory with {METRICS_FILE}, got {str(run)!r}; train there first.")
    lines: dict[tuple, dict] = {}
    torn = []
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            line = json.loads(text)
            step = int(line["step"])
        except (ValueError, TypeError, KeyError):
            torn.append(str(number))
            continue
        kind = "eval" if any(key.startswith("eval_") for key in line) else "end" if "train_runtime" in line else "train"
        lines[step, kind, number if kind == "end" else 0] = line
    if torn:
        warnings.warn(
            f"{path}: line {', '.join(torn)} was cut short and is left out.", stacklevel=1
        )  # once, whoever reads
    return [lines[key] for key in sorted(lines)]
