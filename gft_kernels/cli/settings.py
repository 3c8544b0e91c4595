"""The settings of `gft train`: a YAML file, overridden by flags; every key known, every value of its kind."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass
from pathlib import Path

import yaml

from gft_kernels.trainer import GFTConfig


@dataclass
class RunSettings:
    """What a run needs beside the training options: model, data, rewards."""

    model: str
    data: str
    eval_data: str | None = None
    tokenizer: str | None = None
    model_config: str | None = None  # a config.json, for --dry-run where the model is not on this disk
    reader: str | None = None  # dotted path of f(path) -> rows; None: .jsonl, .json or .parquet rows
    eval_reader: str | None = None  # None: as reader
    rewards: list[str] | None = None
    rollout_fn: str | None = None  # dotted path of a rollout function


def load(config: str | None, flags: list[str], data: str | None) -> tuple[RunSettings, dict]:
    """The run's settings and the keyword arguments of GFTConfig, from file and flags.

    Raises: FileNotFoundError, ValueError naming the key.
    """
    values = {**_read_yaml(config), **_read_flags(flags), **({"data": data} if data is not None else {})}
    own = {f.name for f in dataclasses.fields(RunSettings)}
    hints = {**typing.get_type_hints(GFTConfig), **typing.get_type_hints(RunSettings)}
    known = own | {f.name for f in dataclasses.fields(GFTConfig) if f.init}
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean `{close[0]}`?" if close else "see docs/training.md."
            raise ValueError(f"key `{key}` must be an option of gft train, got one that is not; {hint}")
    values = {key: _as_kind(key, value, hints[key]) for key, value in values.items()}
    for key in ("model", "data", "output_dir"):
        if values.get(key) is None:
            raise ValueError(f"key `{key}` must be given, got nothing; set it in the YAML file or by --{key}.")
    settings = RunSettings(**{key: value for key, value in values.items() if key in own})
    return settings, {key: value for key, value in values.items() if key not in own}


def _read_yaml(path):
    if path is None:
        return {}
    if not Path(path).is_file():
        raise FileNotFoundError(f"--config must be a YAML file, got {path!r}; there is no such file.")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} must be YAML, got {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold keys and values, got {type(values).__name__}.")
    return values


def _read_flags(flags):
    values, position = {}, 0
    while position < len(flags):
        key, given, value = flags[position].partition("=")
        if not key.startswith("--"):
            raise ValueError(f"flags must have the form --key value, got {flags[position]!r}.")
        position += 1
        if not given:
            if position == len(flags):
                raise ValueError(f"flag {key} must be followed by a value, got nothing.")
            value, position = flags[position], position + 1
        values[key[2:].replace("-", "_")] = yaml.safe_load(value)
    return values


def _as_kind(key, value, hint):
    """The value if it is of the option's type; YAML reads 1e-4 as text, which is meant as a number."""
    alternatives = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kinds = [typing.get_origin(kind) or kind for kind in alternatives]
    if value is None and type(None) in kinds:
        return None
    if isinstance(value, str) and float in kinds and str not in kinds:
        try:
            return float(value)
        except ValueError:
            pass
    if isinstance(value, str) and list in kinds and str not in kinds:
        return [part.strip() for part in value.split(",")]
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds:
        return float(value) if int not in kinds else value
    simple = [kind for kind in kinds if kind in (bool, int, float, str, list, dict)]
    if len(simple) < len([kind for kind in kinds if kind is not type(None)]):
        return value  # an enumeration or the like: TrainingArguments checks it
    if not any(type(value) is kind for kind in simple):
        names = " or ".join(kind.__name__ for kind in simple)
        raise ValueError(f"key `{key}` must be {names}, got {value!r}.")
    return value
