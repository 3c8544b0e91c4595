"""Groups shown while training: the first on the console, all in completions.jsonl and in trackers that hold text."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from gft_kernels.trainer.callbacks import say
from gft_kernels.trainer.groups import Group

COMPLETIONS_FILE = "completions.jsonl"
LIBRARIES = ("_wandb", "_trackio")  # where transformers' callbacks keep the library whose tables can be logged


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
