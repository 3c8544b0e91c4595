"""Every key of a run's configuration, with kind, default and meaning: for `gft train --help` and `gft init`."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import typing
from dataclasses import dataclass
from typing import Any

import yaml
from transformers import TrainingArguments

from gft_kernels.cli.settings import UNREAD, RunSettings
from gft_kernels.trainer import GFTConfig

RUN, TRAINING = "Run", "Training"  # the first section, and the one of transformers' own arguments


@dataclass(frozen=True)
class Key:
    """One key: its kind and default as YAML would say them, and its meaning in one sentence."""

    name: str
    kind: str
    default: str
    meaning: str


def sections() -> dict[str, list[Key]]:
    """The keys of each section, in the order of their definition; what gft train does not read is left out."""
    found: dict[str, list[Key]] = {RUN: []}
    hints = {**typing.get_type_hints(GFTConfig), **typing.get_type_hints(RunSettings)}
    options, taken = {field.name: field for field in dataclasses.fields(GFTConfig) if field.init}, set(UNREAD)
    kinds = GFTConfig.__mro__[: GFTConfig.__mro__.index(TrainingArguments)]
    groups = [list(dataclasses.fields(RunSettings)), [options.pop("output_dir")]]
    groups += [[options[name] for name in inspect.get_annotations(kind) if name in options] for kind in kinds]
    section = RUN
    for field in (field for group in groups for field in group):
        section = field.metadata.get("section", section)
        found.setdefault(section, []).append(_key(field, hints[field.name]))
        taken.add(field.name)
    found[TRAINING] += [_key(field, hints[name]) for name, field in options.items() if name not in taken]
    return found


def _key(field: dataclasses.Field, hint: Any) -> Key:
    kind = inspect.formatannotation(hint).replace("transformers.trainer_utils.", "").replace("typing.", "")
    if field.default is not dataclasses.MISSING:
        default = as_yaml(field.default)
    else:
        default = "required" if field.default_factory is dataclasses.MISSING else as_yaml(field.default_factory())
    return Key(field.name, kind, default, _first_sentence(field.metadata.get("help", "")))


def as_yaml(value: Any) -> str:
    """A value as it stands behind its key, on one line."""
    value = getattr(value, "value", value)  # of an enumeration
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
    return text.removesuffix("\n").removesuffix("\n...")


def _first_sentence(text: str) -> str:
    text = " ".join(text.split())
    return re.split(r"(?<=[^.][.!])\s(?=[A-Z`])", text, maxsplit=1)[0]


def listing(width: int = 120) -> str:
    """All keys in their sections, one or two lines each."""
    lines = []
    for title, keys in sections().items():
        lines += ["", f"{title}:"]
        for key in keys:
            lines.append(f"  --{key.name} {key.kind.replace(' ', '')}  [{key.default}]")
            lines.append(f"      {key.meaning}"[:width])
    return "\n".join(lines[1:])
