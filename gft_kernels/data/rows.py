"""Rows: what a training file holds, checked and tokenised before training begins."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch.utils.data import Dataset

OWN_FIELDS = ("prompt", "demonstrations", "responses", "rewards")


class RowError(ValueError):
    """A row of the data cannot be used; the message names its file, line and field."""


class Record(dict):
    """One row as read from a file, with the place it came from."""

    where = "a row"

    @classmethod
    def at(cls, where: str, fields: dict) -> Record:
        record = cls(fields)
        record.where = where
        return record


@dataclass
class Response:
    """One response of a group. `ids` end in the end-of-text token where the response ended by itself."""

    text: str
    ids: list[int]
    source: str  # "expert", "teacher", "sampled" or "offline"
    reward: float = math.nan
    advantage: float = 1.0


@dataclass
class Row:
    """One row, tokenised: a prompt, the responses the row brings along, and the columns rewards may read."""

    prompt: str | list[dict]
    prompt_ids: list[int]
    given: list[Response]
    columns: dict = field(default_factory=dict)
    where: str = "a row"
    absent: bool = False  # a place in a batch that the rows did not suffice for (ranks.EvenSampler)


def read_records(path: str | Path) -> list[Record]:
    """Rows of a .jsonl, .json or .parquet file, each knowing its place.

    Raises: RowError naming file and line; FileNotFoundError; ValueError for another kind of file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data must be a file, got {str(path)!r}; there is no such file.")
    if path.suffix == ".jsonl":
        return list(_json_lines(path))
    if path.suffix == ".json":
        rows, unit = json.loads(path.read_text(encoding="utf-8")), "item"
        if not isinstance(rows, list):
            raise RowError(f"{path}: must hold a list of rows, got {type(rows).__name__}.")
    elif path.suffix == ".parquet":
        import pyarrow.parquet

        rows, unit = pyarrow.parquet.read_table(path).to_pylist(), "row"
    else:
        raise ValueError(f"data must be a .jsonl, .json or .parquet file, got {str(path)!r}.")
    return [_record(fields, f"{path}, {unit} {number}") for number, fields in enumerate(rows, 1)]


def _json_lines(path):
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{path}, line {number}"
                try:
                    fields = json.loads(line)
                except json.JSONDecodeError as error:
                    raise RowError(f"{where}: must be one JSON object, got {error}.") from None
                yield _record(fields, where)


def _record(fields, where):
    if not isinstance(fields, dict):
        raise RowError(f"{where}: must be an object with fields, got {type(fields).__name__}.")
    return Record.at(where, fields)


def check_record(record: dict, where: str) -> None:
    """Raises RowError naming the place and the field if a row's own fields are malformed."""

    def require(holds, name, condition):
        if not holds:
            raise RowError(f"{where}: field `{name}` must {condition}, got {_excerpt(record.get(name))}.")

    prompt = record.get("prompt")
    require(is_text(prompt) or is_messages(prompt), "prompt", "be text or a list of {role, content} messages")
    for name in ("demonstrations", "responses"):
        texts = record.get(name)
        require(texts is None or (_is_list(texts) and all(map(is_text, texts))), name, "be a list of non-empty texts")
    responses, rewards = record.get("responses"), record.get("rewards")
    require(rewards is None or (_is_list(rewards) and all(map(_is_number, rewards))), "rewards", "be a list of numbers")
    require((responses is None) == (rewards is None), "rewards", "come together with `responses`")
    require(responses is None or len(responses) == len(rewards or ()), "rewards", "hold one number per response")
    require(responses is None or len(responses) > 0, "responses", "hold at least one response")
    require(responses is None or not record.get("demonstrations"), "demonstrations", "be absent where `responses` is")


def is_text(value):
    return isinstance(value, str) and value.strip() != ""


def _is_list(value):
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_messages(value):
    return (
        _is_list(value)
        and len(value) > 0
        and all(isinstance(m, dict) and is_text(m.get("role")) and isinstance(m.get("content"), str) for m in value)
    )


def _excerpt(value, width=60):
    text = "nothing" if value is None else f"{type(value).__name__} {value!r}"
    return text if len(text) <= width else text[: width - 1] + "…"


class Rows(Dataset):
    """A checked view of a list of rows or a datasets.Dataset that tokenises each row when it is asked for.

    Raises: RowError for a malformed row, a missing column, or (overlong="error") a row beyond a length limit.
    """

    def __init__(self, records, name, tokenizer, config, context, required_columns=()):
        if not hasattr(records, "__len__") or not hasattr(records, "__getitem__") or isinstance(records, (str, dict)):
            raise TypeError(f"{name} must be a list of rows or a datasets.Dataset, got {type(records).__name__}.")
        self.records, self.name, self.tokenizer, self.config, self.context = records, name, tokenizer, config, context
        self.required_columns = required_columns
        self.offline = len(records) > 0 and records[0].get("responses") is not None
        self.kept = [i for i in range(len(records)) if self._usable(i)]
        if not self.kept:
            raise RowError(f"{name} must hold at least one usable row, got {len(records)} rows and kept none.")

    def __len__(self):
        return len(self.kept)

    def __getitem__(self, index: int | None) -> Row:
        if index is None:
            return Row("", [self.tokenizer.eos_token_id], [], where="no row", absent=True)
        return self._row(self.kept[index])

    def _row(self, i):
        record = self.records[i]
        if self.offline:
            texts, sources = record["responses"], ["offline"] * len(record["responses"])
        else:
            texts = list(record.get("demonstrations") or [])[: self.config.num_demonstrations]
            sources = ["expert"] + ["teacher"] * (len(texts) - 1)
        given = [Response(t, encode_response(self.tokenizer, t), s) for t, s in zip(texts, sources, strict=False)]
        for response, reward in zip(given, record.get("rewards") or [], strict=False):
            response.reward = float(reward)
        columns = {key: value for key, value in record.items() if key not in OWN_FIELDS}
        prompt = record["prompt"]
        return Row(prompt, encode_prompt(self.tokenizer, prompt), given, columns, self._where(i))

    def _where(self, i):
        return getattr(self.records[i], "where", f"{self.name}[{i}]")

    def _usable(self, i):
        record, where = self.records[i], self._where(i)
        if not isinstance(record, dict):
            raise RowError(f"{where}: must be an object with fields, got {type(record).__name__}.")
        check_record(record, where)
        self._check_kind(record, where)
        fault = self._overlong(self._row(i))
        if fault and self.config.overlong == "error":
            raise RowError(f"{where}: {fault}, or set overlong to 'drop'.")
        return not fault

    def _check_kind(self, record, where):
        for column in () if self.offline else self.required_columns:
            if record.get(column) is None:
                raise RowError(f"{where}: field `{column}` must be given, got nothing; a reward function reads it.")
        if (record.get("responses") is not None) != self.offline:
            raise RowError(f"{where}: field `responses` must be given in all rows or in none.")
        wanted = 0 if self.offline else self.config.num_demonstrations
        found = len(record.get("demonstrations") or [])
        if found < wanted:
            raise RowError(
                f"{where}: field `demonstrations` must hold at least num_demonstrations = {wanted} texts, got {found}."
            )
        if not isinstance(record["prompt"], str) and getattr(self.tokenizer, "chat_template", None) is None:
            raise RowError(f"{where}: field `prompt` must be text, got messages; the tokenizer has no chat template.")

    def _overlong(self, row):
        """What is too long about the row and its remedy, or None."""
        config, prompt = self.config, len(row.prompt_ids)
        longest = max((len(r.ids) for r in row.given), default=0)
        if config.max_prompt_length is not None and prompt > config.max_prompt_length:
            return f"field `prompt` has {prompt} tokens, max_prompt_length is {config.max_prompt_length}; raise it"
        if longest > config.max_completion_length:
            return f"a response has {longest} tokens, max_completion_length is {config.max_completion_length}; raise it"
        reach = prompt + max(longest, config.max_completion_length if config.num_generations else 0)
        if self.context is not None and reach > self.context:
            return f"prompt and response reach {reach} tokens, the model's context is {self.context}; shorten them"
        return None


def encode_prompt(tokenizer, prompt) -> list[int]:
    """Token ids of a prompt; messages go through the chat template, opened for the assistant's turn."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_response(tokenizer, text) -> list[int]:
    """Token ids of a complete response, closed by the end-of-text token so that the policy learns to stop."""
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
