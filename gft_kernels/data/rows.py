"""Rows: what a training file holds, checked before training begins and tokenised when asked for."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import Dataset

from gft_kernels.checks import check_reward_values
from gft_kernels.data import text
from gft_kernels.data.fields import OWN_FIELDS, check_record, demonstrations
from gft_kernels.data.readers import Record, RowError

TABLES = ("pandas", "polars", "arrow")  # formats in which a row of a datasets.Dataset is a table of one row


@dataclass
class Response:
    """One response of a group. `ids` end in an end token where the response ended by itself; `text` is without it."""

    text: str
    ids: list[int]
    source: str  # "expert", "teacher", "sampled" or "offline"
    reward: float = math.nan
    advantage: float = 1.0
    truncated: bool = False  # a sample that was cut at the length limit


@dataclass
class Row:
    """One row, tokenised: a prompt, the responses the row brings along, and the columns rewards may read."""

    prompt: str | list[dict]
    prompt_ids: list[int]
    given: list[Response]
    columns: dict = field(default_factory=dict)
    where: str = "a row"
    absent: bool = False  # a place in a batch that the rows did not suffice for (windows.EvenSampler)


@dataclass(frozen=True)
class Limits:
    """What a model can read; None: not known."""

    context: int | None = None  # tokens of prompt and response
    vocabulary: int | None = None  # rows of the embedding

    @classmethod
    def of(cls, config: Any) -> Limits:
        """From a transformers configuration, of whose parts the decoder of text is the one that counts."""
        text_config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        return cls(getattr(text_config, "max_position_embeddings", None), getattr(text_config, "vocab_size", None))


def numbered(records: Any, name: str) -> Any:
    """The rows of a list, a datasets.Dataset or a pandas.DataFrame by their numbers. Raises TypeError for others."""
    if hasattr(records, "iloc"):  # a pandas.DataFrame, whose items are columns
        return records.to_dict("records")
    if not hasattr(records, "__len__") or not hasattr(records, "__getitem__") or isinstance(records, (str, dict)):
        raise TypeError(f"{name} must be a list of rows or a datasets.Dataset, got {type(records).__name__}.")
    if hasattr(records, "with_format") and records.format["type"] in TABLES:
        return records.with_format(None, columns=records.format["columns"])
    return records


class Rows(Dataset):
    """A checked view of rows (a list, a datasets.Dataset, a pandas.DataFrame) that tokenises each when asked for it.

    Raises: RowError for a malformed row, a missing column, or (overlong="error") a row beyond a length limit.
    Warns, once for each kind, of prompts that are hardly meant so.
    """

    def __init__(self, records, name, tokenizer, config, limits: Limits, required_columns: Sequence[str] = ()):
        records = numbered(records, name)
        self.records, self.name, self.tokenizer, self.config, self.limits = records, name, tokenizer, config, limits
        self.required_columns = required_columns
        self.offline = len(records) > 0 and self._record(0)[0].get("responses") is not None
        if self.offline and config.overlong == "truncate":
            raise ValueError(
                "overlong must be 'error' or 'drop' where rows bring `rewards`, got 'truncate'; "
                "a reward is that of the whole response."
            )
        doubts: dict[str, str] = {}
        self.kept = [i for i in range(len(records)) if self._usable(i, doubts)]
        if not self.kept:
            raise RowError(f"{name} must hold at least one usable row, got {len(records)} rows and kept none.")
        for sentence in doubts.values():
            warnings.warn(f"{sentence}; it is the first such row.", stacklevel=2)

    def __len__(self):
        return len(self.kept)

    def __getitem__(self, index: int | None) -> Row:
        if index is None:
            return Row("", [self.tokenizer.eos_token_id], [], where="no row", absent=True)
        record, where = self._record(self.kept[index])
        prompt_ids, encoded = self._encoded(record, where)
        ends, skip = text.end_tokens(self.tokenizer), self.config.skip_special_tokens
        texts = [text.decode(self.tokenizer, ids, ends, skip) for ids in encoded]
        given = [Response(*fields) for fields in zip(texts, encoded, self._texts(record, where)[1], strict=True)]
        for response, reward in zip(given, record.get("rewards") or [], strict=False):
            response.reward = float(reward)
        columns = {key: value for key, value in record.items() if key not in OWN_FIELDS}
        return Row(record["prompt"], prompt_ids, given, columns, where)

    def _record(self, i: int) -> tuple[dict[str, Any], str]:
        """The fields of a row, and where it stands."""
        given = self.records[i]
        where = given.where if isinstance(given, Record) else f"{self.name}[{i}]"
        return check_record(given, where), where

    def _texts(self, record: dict[str, Any], where: str) -> tuple[list[str], list[str]]:
        """The responses that the row brings along, and what each of them is."""
        if self.offline:
            return record["responses"], ["offline"] * len(record["responses"])
        texts = demonstrations(record, self.config.num_demonstrations, where)
        return texts, (["expert"] + ["teacher"] * len(texts))[: len(texts)]

    def _encoded(self, record: dict[str, Any], where: str) -> tuple[list[int], list[list[int]]]:
        """Token ids of the prompt and of the row's responses, cut without an end token where overlong says so."""
        config, prompt = self.config, record["prompt"]
        try:
            ids = text.encode_prompt(self.tokenizer, prompt, record.get("tools"), record.get("chat_template_kwargs"))
        except ValueError as error:
            raise RowError(f"{where}: {error}.") from None
        encoded = [text.encode_response(self.tokenizer, r, prompt, ids) for r in self._texts(record, where)[0]]
        if config.overlong == "truncate":
            room = math.inf if self.limits.context is None else self.limits.context - len(ids)
            encoded = [r[: max(1, min(config.max_completion_length, room))] for r in encoded]
        return ids, encoded

    def _usable(self, i: int, doubts: dict[str, str]) -> bool:
        record, where = self._record(i)
        self._check_kind(record, where)
        prompt_ids, encoded = self._encoded(record, where)
        if not prompt_ids:
            raise RowError(f"{where}: field `prompt` must have a token, got none of {record['prompt']!r:.60}.")
        self._check_vocabulary([prompt_ids, *encoded], where)
        for kind, sentence in text.doubts(self.tokenizer, prompt_ids, self._texts(record, where)[0], encoded):
            doubts.setdefault(kind, f"{where}: {sentence}")
        fault = self._overlong(len(prompt_ids), max(map(len, encoded), default=0))
        if fault and self.config.overlong == "error":
            raise RowError(f"{where}: {fault}, or set overlong to 'drop'.")
        return not fault

    def _check_kind(self, record, where):
        unrewarded = self.offline and self.name == "train_dataset"  # other rows are sampled for
        for column in () if unrewarded else self.required_columns:
            if record.get(column) is None:
                raise RowError(f"{where}: field `{column}` must be given, got nothing; a reward function reads it.")
        if (record.get("responses") is not None) != self.offline:
            raise RowError(f"{where}: field `responses` must be given in all rows or in none.")
        if self.offline:
            rewards_S = torch.tensor(record["rewards"], dtype=torch.float64)
            try:
                check_reward_values(rewards_S, self.config.normalize, len(rewards_S), None)
            except ValueError as error:
                raise RowError(f"{where}: {error}.") from None
        if not isinstance(record["prompt"], str) and getattr(self.tokenizer, "chat_template", None) is None:
            raise RowError(f"{where}: field `prompt` must be text, got messages; the tokenizer has no chat template.")

    def _check_vocabulary(self, texts: list[list[int]], where: str) -> None:
        largest, size = max(max(ids, default=0) for ids in texts), self.limits.vocabulary
        if size is not None and largest >= size:
            raise RowError(
                f"{where}: token ids must be below {size}, the rows of the model's embedding, got {largest}; "
                "resize it (model.resize_token_embeddings), or pass the model's own tokenizer."
            )

    def _overlong(self, prompt: int, longest: int) -> str | None:
        """What is too long about a row with so many tokens and its remedy, or None."""
        config = self.config
        if config.max_prompt_length is not None and prompt > config.max_prompt_length:
            return f"field `prompt` has {prompt} tokens, max_prompt_length is {config.max_prompt_length}; raise it"
        if longest > config.max_completion_length:
            return f"a response has {longest} tokens, max_completion_length is {config.max_completion_length}; raise it"
        context = self.limits.context
        sampled = config.num_generations or self.name != "train_dataset"  # evaluation always samples
        reach = prompt + max(longest, config.max_completion_length if sampled else 0)
        if context is not None and reach > context:
            return f"prompt and response reach {reach} tokens, the model's context is {context}; shorten them"
        return None
