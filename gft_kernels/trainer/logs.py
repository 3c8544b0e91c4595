"""What a run writes down and shows: its metrics, a line for each log call, groups of responses."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import textwrap
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback

from gft_kernels.trainer.groups import Group

METRICS_FILE, COMPLETIONS_FILE = "metrics.jsonl", "completions.jsonl"
LIBRARIES = ("_wandb", "_trackio")  # where transformers' callbacks keep the library whose tables can be logged


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


def read_metrics(run: str | Path) -> list[dict]:
    """The log lines of a run in step order; where a resumed run logged a number of a step again, the later counts,
    and what it had logged of steps behind those it went on with is left out.

    Each time it ended it says how long it took, at the same step too if it was resumed with none left.
    Lines cut short by a crash or a full disk are left out, with a warning.
    Raises: FileNotFoundError if the directory holds no metrics.jsonl.
    """
    path = Path(run, METRICS_FILE)
    if not path.is_file():
        raise FileNotFoundError(f"run must be a directory with {METRICS_FILE}, got {str(run)!r}; train there first.")
    lines: dict[tuple, dict] = {}
    last, torn = 0, []
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            line = json.loads(text)
            step = int(line["step"])
        except (ValueError, TypeError, KeyError):
            torn.append(str(number))
            continue
        if step < last:
            lines = {key: kept for key, kept in lines.items() if key[0] <= step}
        last = step
        kind = "eval" if any(key.startswith("eval_") for key in line) else "end" if "train_runtime" in line else "train"
        key = step, kind, number if kind == "end" else 0
        lines[key] = {**lines.get(key, {}), **line}  # several sets of held-out rows have a line each
    if torn:
        warnings.warn(
            f"{path}: line {', '.join(torn)} was cut short and is left out.", stacklevel=1
        )  # once, whoever reads
    return [lines[key] for key in sorted(lines)]


# Groups of responses


def show_completions(
    groups: Sequence[Group], step: int, output_dir: str, callbacks: Iterable[TrainerCallback] = ()
) -> None:
    """Prints the first group, appends one JSON line per response of all to completions.jsonl, and tells trackers."""
    entries = []
    for row, r in ((g.row, r) for g in groups for r in g.responses):
        entry = {"step": step, "row": row.where, "source": r.source, "advantage": r.advantage}
        entry |= {"reward": r.reward if r.reward == r.reward else None, "prompt": row.prompt, "text": r.text}
        entries.append(entry)
    with Path(output_dir, COMPLETIONS_FILE).open("a", encoding="utf-8") as lines:
        lines.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    say("\n" + completions_table(groups[0], step))
    _to_trackers(groups, entries, step, callbacks)


def _to_trackers(groups: Sequence[Group], entries: list[dict], step: int, callbacks: Iterable[TrainerCallback]) -> None:
    for callback in callbacks:
        library = next(filter(None, (getattr(callback, name, None) for name in LIBRARIES)), None)
        if library is not None:
            import pandas

            table = pandas.DataFrame([{**entry, "prompt": _asked(entry["prompt"])} for entry in entries])
            library.log({"completions": library.Table(dataframe=table), "train/global_step": step})
        elif isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            text = "\n\n".join(completions_table(group, step) for group in groups)
            callback.tb_writer.add_text("completions", textwrap.indent(text, "    "), step)  # Markdown: as it is


def completions_table(group: Group, step: int, width: int = 110) -> str:
    """One group as a table: where each response comes from, its reward, its advantage, its text."""
    lines = [f"step {step} · {group.row.where} · {shorten(_asked(group.row.prompt), width)}"]
    lines.append(f"{'source':8} {'reward':>7} {'advantage':>9} {'tokens':>6}  text")
    for r in group.responses:
        text = shorten(r.text, width - 36)
        lines.append(f"{r.source:8} {r.reward:7.3f} {r.advantage:+9.3f} {len(r.ids):6}  {text}")
    return "\n".join(lines)


def _asked(prompt: str | list[dict]) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def shorten(text: str, width: int) -> str:
    """The beginning of a text, on one line."""
    return textwrap.shorten(text.replace("\n", " ⏎ "), width, placeholder=" …")
