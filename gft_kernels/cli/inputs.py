"""What the user gives a run: its configuration, tokenizer, rows and code; whatever is wrong with it is one sentence."""

from __future__ import annotations

import functools
import inspect
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoTokenizer
from transformers.integrations import get_available_reporting_integrations

from gft_kernels.cli.exits import one_line
from gft_kernels.cli.settings import RunSettings
from gft_kernels.data import pretrained
from gft_kernels.data.fields import check_record
from gft_kernels.data.rows import numbered
from gft_kernels.trainer import GFTConfig, read_records
from gft_kernels.trainer.rewards import find

BAD = (ValueError, TypeError, OSError, SafetensorError)  # how bad input shows in libraries
TRACKERS = ("tensorboard", "trackio", "wandb")  # which transformers misses when the model has been loaded already


def configuration(options: dict[str, Any]) -> GFTConfig:
    """The configuration of the trainer. Raises ValueError for whatever TrainingArguments makes of wrong options."""
    try:
        found = GFTConfig(**options)
    except (*BAD, ImportError):
        raise
    except Exception as error:
        raise ValueError(f"options must be GFTConfig's, got {type(error).__name__}: {one_line(error)}") from error
    asked: Any = found.report_to  # which transformers has made a list
    installed = get_available_reporting_integrations()
    for name in TRACKERS:
        if name in asked and name not in installed:
            raise ValueError(f"report_to must name what is installed, got {name!r}, which is not; pip install {name}.")
    return found


def tokenizer_of(settings: RunSettings) -> Any:
    """The run's tokenizer. Raises ValueError where it is not, or where the model is a folder that is not."""
    named = {"model": settings.model, **({"tokenizer": settings.tokenizer} if settings.tokenizer else {})}
    for key, name in named.items():
        name = pretrained.located(name)
        is_path = Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
        if is_path and not Path(name).is_dir():
            raise ValueError(
                f"{key} must be a folder or the name of a model on the hub, got {name!r}; there is no such folder."
            )
    try:
        return AutoTokenizer.from_pretrained(name)
    except (*BAD, ImportError, KeyError) as error:
        raise ValueError(
            f"{key} must be a folder or the name of a model on the hub, with a tokenizer, got {name!r}; "
            f"{one_line(error)}"
        ) from None


def blamed(error: BaseException) -> str:
    """An error of the user's code, and where it arose."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {one_line(error)} ({frame.filename}:{frame.lineno})"


def rows(path: str, reader: str | None, split: str, names: tuple[str, str] = ("data", "reader")) -> Sequence:
    """Rows of a file, or of whatever a reader makes of the path; each checked where it was read.

    names: the keys of the two, for errors.
    """
    if reader is None:
        records = read_records(path, names[0])
        for record in records:
            check_record(record, record.where)
        return records
    read = find(reader, names[1])
    if "split" in inspect.signature(read).parameters:
        read = functools.partial(read, split=split)
    try:
        return numbered(read(None if path == "sample" else path), f"what {names[1]} returns")
    except (*BAD, ImportError):
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(f"{names[1]} must read {path!r}, got {blamed(error)}; see {reader}.") from None


def held_out_rows(settings: RunSettings) -> tuple[Sequence | None, int]:
    """The rows that are evaluated, and how many there are to choose from; None and 0 without eval_data."""
    if settings.eval_data is None:
        return None, 0
    names = ("eval_data", "eval_reader" if settings.eval_reader else "reader")
    found = rows(settings.eval_data, settings.eval_reader or settings.reader, "test", names)
    return spread(found, settings.eval_rows), len(found)


def spread(records: Sequence, count: int | None) -> Sequence:
    """As many of the rows, evenly apart, for files are often sorted; None: all. Raises ValueError below 1."""
    if count is not None and count < 1:
        raise ValueError(f"eval_rows must be at least 1, got {count}; null takes all, no eval_data none.")
    if count is None or count >= len(records):
        return records
    return [records[i * len(records) // count] for i in range(count)]
