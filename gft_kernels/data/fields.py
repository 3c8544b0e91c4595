"""What a row may hold: its fields, the names that are taken, and what each field must be."""

from __future__ import annotations

import json
import numbers
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gft_kernels.checks import WHOLE
from gft_kernels.data.readers import RowError

OWN_FIELDS = ("prompt", "demonstrations", "responses", "rewards")
OF_THE_TEMPLATE = ("tools", "chat_template_kwargs")
# What trainers hand to reward functions beside the columns (TRL's among them): a column must not take its place.
RESERVED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments")
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which JSON can spell and no tokenizer reads


def check_record(record: Any, where: str) -> dict[str, Any]:
    """The row with plain values in its own fields: lists, dicts, texts and numbers for numpy's, pandas' and torch's.

    What a table leaves empty (NaN, pandas.NA) is None, in every field.

    Raises: RowError naming the place and the field if a field is malformed or its name is taken.
    """
    if hasattr(record, "to_dict"):  # a row of a pandas.DataFrame
        record = record.to_dict()
    if not isinstance(record, Mapping):
        raise RowError(f"{where}: must be an object with fields, got {type(record).__name__}.")
    _check_names(record, where)
    record = {name: None if is_empty(value) else value for name, value in record.items()}
    row = {**record, **{name: plain(record[name]) for name in OWN_FIELDS if name in record}}
    row.update({name: _template_field(record[name]) for name in OF_THE_TEMPLATE if name in record})

    def require(holds: bool, name: str, condition: str) -> None:
        if not holds:
            raise RowError(f"{where}: field `{name}` must {condition}, got {_excerpt(row.get(name))}{others}.")

    others = "" if "prompt" in row else f" beside {', '.join(row) or 'nothing'}; rename fields, or write a `reader`"
    prompt, responses, rewards = row.get("prompt"), row.get("responses"), row.get("rewards")
    require(is_text(prompt) or is_messages(prompt), "prompt", "be text or a list of {role, content} messages")
    for name in ("demonstrations", "responses"):
        require(row.get(name) is None or _all(is_text, row[name]), name, "be a list of non-empty texts")
    require(rewards is None or _all(_is_number, rewards), "rewards", "be a list of numbers")
    told_apart = all(abs(reward) < WHOLE for reward in rewards or () if isinstance(reward, int))
    require(told_apart, "rewards", "be below 2^53 in size where they are whole")
    require((responses is None) == (rewards is None), "rewards", "come together with `responses`")
    require(responses is None or len(responses) == len(rewards or ()), "rewards", "hold one number per response")
    require(responses is None or len(responses) > 0, "responses", "hold at least one response")
    require(responses is None or not row.get("demonstrations"), "demonstrations", "be absent where `responses` is")
    tools, options = row.get("tools"), row.get("chat_template_kwargs")
    require(tools is None or _all(_is_tool, tools), "tools", "be a list of descriptions of functions")
    require(options is None or isinstance(options, dict), "chat_template_kwargs", "name variables of the chat template")
    for name in OF_THE_TEMPLATE:
        require(not (row.get(name) and isinstance(prompt, str)), name, "be absent where `prompt` is text")
    return row


def demonstrations(row: Mapping[str, Any], number: int, where: str) -> list[str]:
    """The first so many of a checked row. Raises RowError where it has fewer."""
    found = (row.get("demonstrations") or [])[:number]
    if len(found) < number:
        raise RowError(
            f"{where}: field `demonstrations` must hold at least num_demonstrations = {number} texts, got {len(found)}."
        )
    return found


def _check_names(record: Mapping[Any, Any], where: str) -> None:
    for name in record:
        if not isinstance(name, str):
            raise RowError(f"{where}: the name of a field must be text, got {name!r}.")
        if name in RESERVED:
            raise RowError(
                f"{where}: field `{name}` must have another name, got one that reward functions get from the "
                "trainer; rename the column."
            )


def plain(value: Any) -> Any:
    """Lists, dicts and numbers in place of what numpy, pandas and torch hold them in."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def is_empty(value: Any) -> bool:
    """Whether this is how a table says that a row has no such field."""
    if isinstance(value, numbers.Real):
        return bool(value != value)  # NaN; a whole number may be larger than any float
    return value is None or type(value).__name__ in ("NAType", "NaTType")  # pandas' own, which need not be installed


def _template_field(value: Any) -> Any:
    """Tables give every row the fields of all and keep lists of tools as JSON text: neither is meant."""
    value = plain(value)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return value
    return _without_nones(value)


def _without_nones(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nones(item) for name, item in value.items() if not is_empty(item)}
    return [_without_nones(item) for item in value] if isinstance(value, list) else value


def is_text(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != "" and not SURROGATE.search(value)


def is_messages(value: Any) -> bool:
    return _all(_is_message, value) and len(value) > 0


def _is_message(value: Any) -> bool:
    content = value.get("content") if isinstance(value, Mapping) else None
    return isinstance(content, str) and not SURROGATE.search(content) and is_text(value.get("role"))


def _is_tool(value: Any) -> bool:
    return isinstance(value, Mapping) or callable(value)


def _is_number(value: Any) -> bool:
    largest = sys.float_info.max
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -largest <= value <= largest


def _all(holds: Callable[[Any], bool], values: Any) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, str) and all(map(holds, values))


def _excerpt(value: Any, width: int = 60) -> str:
    text = "nothing" if value is None else f"{type(value).__name__} {value!r}"
    return text if len(text) <= width else text[: width - 1] + "…"
