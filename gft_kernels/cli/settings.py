"""The settings of `gft train`: a YAML file, overridden by flags; every key known, every value of its kind."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import yaml

from gft_kernels.model.loss_options import option
from gft_kernels.trainer import GFTConfig
from gft_kernels.trainer.config_checks import nearest

SECRET = re.compile(r"(^|_)(token|secret|password|passwd|credentials?|(api|access|secret)_?key)$", re.IGNORECASE)
OF_THE_COMMAND = ("config", "resume", "resume_anyway", "dry_run", "ranks")


@dataclass
class RunSettings:
    """What a run needs beside the training options: model, data, rewards."""

    model: str = option(MISSING, "The model to train: a folder, a GGUF file, or a name.", section="Run")
    data: str = option(MISSING, "Training rows: a .jsonl, .json or .parquet file, or what `reader` takes.")
    eval_data: str | None = option(
        None, "Held-out rows, evaluated at the end; eval_on_start, eval_strategy: before, between."
    )
    eval_rows: int | None = option(256, "Of these as many are evaluated, spread over the file; null: all.")
    tokenizer: str | None = option(None, "The tokenizer's folder or name; null: the model's.")
    model_config: str | None = option(None, "A config.json for --dry-run where the model is not on this disk.")
    reader: str | None = option(None, "Dotted path of f(path) -> rows; null: rows as they lie in the file.")
    eval_reader: str | None = option(None, "The same for eval_data; null: as reader.")
    rewards: list[str] | None = option(None, "Reward functions: names of ready ones, or dotted paths.")  # noqa: RUF009
    rollout_fn: str | None = option(None, "Dotted path of a function that samples in place of `generate`.")
    peft: dict | None = option(None, "An adapter is trained: options of peft.LoraConfig, such as {r: 16}, and `merge`.")  # noqa: RUF009


class Secret(str):
    """A value no file and no message shows: pickled as None, since training_args.bin is pushed with the model."""

    __slots__ = ()

    def __repr__(self):
        return "'***'"

    def __reduce_ex__(self, protocol):
        return type(None), ()

    def __deepcopy__(self, memo):
        return self


# What TrainingArguments holds for scripts of one's own and for other trainers: nothing here would read it.
UNREAD = {
    "resume_from_checkpoint": "use --resume, which finds the newest whole checkpoint of output_dir",
    "do_train": "gft train always does",
    "do_eval": "set eval_data and eval_strategy",
    "do_predict": "set eval_data, which is also evaluated at the end",
    "local_rank": "torchrun says it",
    "label_names": "the responses are what is learnt",
    "length_column_name": "the length of a group is not known before it is sampled",
}


def load(config: str | None, flags: list[str], data: str | None) -> tuple[RunSettings, dict]:
    """The run's settings and the keyword arguments of GFTConfig, from file and flags.

    Raises: ValueError naming the key.
    """
    values = {**_read_yaml(config), **_read_flags(flags), **({"data": data} if data is not None else {})}
    own = {f.name for f in dataclasses.fields(RunSettings)}
    hints = {**typing.get_type_hints(GFTConfig), **typing.get_type_hints(RunSettings)}
    known = own | {f.name for f in dataclasses.fields(GFTConfig) if f.init}
    for key in values:
        if key not in known:
            hint = nearest(str(key), {*known, *OF_THE_COMMAND}, "see docs/training.md.")
            raise ValueError(f"key `{key}` must be an option of gft train, got one that is not; {hint}")
        if key in UNREAD:
            raise ValueError(f"key `{key}` must be left out, got {values[key]!r}; {UNREAD[key]}.")
    values = {key: _hidden(_as_kind(key, value, hints[key]), key) for key, value in values.items()}
    for key in ("model", "data", "output_dir"):
        if not values.get(key):
            raise ValueError(f"key `{key}` must be given, got nothing; set it in the YAML file or by --{key}.")
    if values.get("eval_data") is None and (values.get("eval_on_start") or values.get("eval_strategy", "no") != "no"):
        raise ValueError("eval_data must be given where eval_on_start or eval_strategy asks for it, got nothing.")
    settings = RunSettings(**{key: value for key, value in values.items() if key in own})
    return settings, {key: value for key, value in values.items() if key not in own}


class _Loader(yaml.SafeLoader):
    """YAML in which a key stands once."""

    def construct_mapping(self, node, deep=False):
        keys: list[Any] = []
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge":
                keys.append(self.construct_object(key, deep=True))
                if keys[-1] in keys[:-1]:
                    line = key.start_mark.line + 1
                    raise yaml.YAMLError(f"key `{keys[-1]}` twice, the second time in line {line}")
        return super().construct_mapping(node, deep)


def _parse(text: str, what: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a date like 2024-99-99
        raise ValueError(f"{what} must be YAML, got {' '.join(str(error).split())}.") from None


def _read_yaml(path):
    if path is None:
        return {}
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"--config must be a YAML file that can be read, got {path!r}; {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8, got another encoding; {error}.") from None
    values = _parse(text, path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold keys and values, got {type(values).__name__}.")
    return values


def _read_flags(flags):
    values, rest = {}, list(flags)
    while rest:
        key, given, value = rest.pop(0).partition("=")
        if not key.startswith("--") or key == "--":
            raise ValueError(f"flags must have the form --key value, got {key + given + value!r}.")
        if not given:
            if not rest or rest[0].startswith("--"):
                got = repr(rest[0]) if rest else "nothing"
                raise ValueError(f"flag {key} must be followed by a value, got {got}.")
            value = rest.pop(0)
        values[key[2:].replace("-", "_")] = _parse(value, f"flag {key}")
    return values


def _hidden(value: Any, key: Any) -> Any:
    """The value with every text a Secret whose key says that it is one."""
    if isinstance(value, dict):
        return {name: _hidden(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_hidden(inner, key) for inner in value]
    return Secret(value) if isinstance(value, str) and SECRET.search(str(key)) else value


def _as_kind(key, value, hint):
    """The value if it is of the option's type; YAML reads 1e-4 as text, which is meant as a number."""
    alternatives = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kinds = [typing.get_origin(kind) or kind for kind in alternatives]
    if value is None and type(None) in kinds:
        return None
    if value is False and key.endswith("_strategy"):
        return "no"  # which is how YAML reads that word without quotes
    if isinstance(value, str) and float in kinds and str not in kinds:
        try:
            return float(value)
        except ValueError:
            pass
    if list in kinds and str not in kinds and isinstance(value, (str, list)):
        if isinstance(value, str):  # whose commas and spaces are meant where it is a stop string
            value = [value] if key == "stop_strings" else [part.strip() for part in value.split(",")]
        kind_of_parts = typing.get_args(alternatives[kinds.index(list)])
        return [_as_kind(key, part, *kind_of_parts) for part in value] if kind_of_parts else value
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds:
        return float(value) if int not in kinds else value
    simple = [kind for kind in kinds if kind in (bool, int, float, str, list, dict)]
    if len(simple) < len([kind for kind in kinds if kind is not type(None)]):
        return value  # an enumeration or the like: TrainingArguments checks it
    if not any(type(value) is kind for kind in simple):
        names = " or ".join(kind.__name__ for kind in simple)
        shown = "a value" if SECRET.search(key) else repr(value)
        raise ValueError(f"key `{key}` must be {names}, got {shown}.")
    return value
