"""One row per response, its advantage in a column: what trainers that know (prompt, response) pairs can carry.

Such a trainer shuffles rows and cuts batches without regard to groups, so the advantage of a response is computed over
its whole group before training, and travels with the row: through tokenising, the collator and the batch into the
patched model, which takes it by the same name.

Sizes: S responses (rows of the batch), L tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gft_kernels import checks
from gft_kernels.advantages import group_advantages
from gft_kernels.api import policy_loss
from gft_kernels.arguments import completed
from gft_kernels.data.fields import check_record
from gft_kernels.data.readers import RowError
from gft_kernels.data.text import encode_prompt, encode_response
from gft_kernels.model.columns import PER_CALL
from gft_kernels.model.forward import OF_THE_MODEL, refuse
from gft_kernels.model.guard import PREFIX
from gft_kernels.model.patch import patch_model, unwrapped
from gft_kernels.options import BACKENDS

COLUMN = PREFIX + "advantages"
_OF_THE_GROUP = ("responses", "rewards")


def response_rows(rows: Iterable[Mapping[str, Any]], **normalisation: Any) -> list[dict[str, Any]]:
    """One row per response of rows that hold `prompt`, `responses` and `rewards`, with its advantage (F5).

    Each has `prompt`, `response`, `gft_advantages` (standardised among its prompt's responses; `normalisation` are
    the options of `group_advantages`: normalize, eps, singleton) and whatever other columns its row has.

    Raises: ValueError for a malformed row.
    """
    found: list[dict[str, Any]] = []
    for number, given in enumerate(rows):
        where = getattr(given, "where", f"rows[{number}]")
        row = check_record(given, where)
        for name in sorted({"response", COLUMN} & row.keys()):
            raise RowError(f"{where}: field `{name}` must have another name, got one that is written here; rename it.")
        if row.get("responses") is None:
            raise RowError(f"{where}: field `responses` must be given, got nothing; score the responses beforehand.")
        rewards_S = torch.tensor([float(reward) for reward in row["rewards"]], dtype=torch.float64)
        advantages = group_advantages(rewards_S, group_size=len(rewards_S), **normalisation).tolist()
        columns = {name: value for name, value in row.items() if name not in _OF_THE_GROUP}
        pairs = zip(row["responses"], advantages, strict=True)
        found += [{**columns, "response": response, COLUMN: advantage} for response, advantage in pairs]
    return found


def encode_row(row: Mapping[str, Any], tokenizer: Any, max_length: int | None = None) -> dict[str, Any]:
    """A row of `response_rows` as token ids: input_ids, attention_mask, labels (-100 on the prompt), gft_advantages.

    The response is closed once, after messages as the chat template closes a turn, else by the end-of-text token.
    Raises: ValueError for a row of more than max_length tokens.
    """
    prompt = encode_prompt(tokenizer, row["prompt"], row.get("tools"), row.get("chat_template_kwargs"))
    response = encode_response(tokenizer, row["response"], row["prompt"], prompt)
    length = len(prompt) + len(response)
    if max_length is not None and length > max_length:
        raise ValueError(
            f"a row must have at most max_length = {max_length} tokens, got {length} in the row that begins with "
            f"{str(row['prompt'])[:60]!r}; drop it or raise max_length"
        )
    return {
        "input_ids": [*prompt, *response],
        "attention_mask": [1] * length,
        "labels": [-100] * len(prompt) + response,
        COLUMN: float(row[COLUMN]),
    }


class CarryAdvantages:
    """A collator around a host's own: takes `gft_advantages` out of the features and puts it back into the batch.

    (S,) float32; where a feature is a list of rows to be packed into one, of the shape of its labels: each token gets
    its response's, padding 0.
    """

    def __init__(self, collator: Callable, padding_side: str = "right"):
        self.collator, self.padding_side = collator, padding_side

    def __call__(self, features: list, *args: Any, **kwargs: Any) -> Any:
        packed = isinstance(features[0], list)
        packs = features if packed else [[row] for row in features]
        taken = [[self._take(row) for row in pack] for pack in packs]
        bare = [[without(row) for row in pack] for pack in packs]
        batch = self.collator(bare if packed else [row for [row] in bare], *args, **kwargs)
        if packed:
            batch[COLUMN] = torch.stack([self._per_token(pack, batch["labels"].shape[1]) for pack in taken])
        else:
            batch[COLUMN] = torch.tensor([advantage for [(advantage, _)] in taken])
        return batch

    def _take(self, row: Mapping[str, Any]) -> tuple[float, int]:
        if row.get(COLUMN) is None:
            raise ValueError(
                f"every row must have the column {COLUMN}, got one with {', '.join(row)}; make rows by response_rows"
            )
        return float(row[COLUMN]), len(row["input_ids"])

    def _per_token(self, pack: list[tuple[float, int]], width: int) -> Tensor:
        advantages, lengths = zip(*pack, strict=True)
        tokens = torch.tensor(advantages).repeat_interleave(torch.tensor(lengths))
        padding = width - len(tokens)
        return nn.functional.pad(tokens, (padding, 0) if self.padding_side == "left" else (0, padding))


def without(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row as a host's collator knows it."""
    return {name: value for name, value in row.items() if name != COLUMN}


def check_loss_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options a host's configuration holds for the loss, names and values checked before anything is loaded.

    Returns: options as a dict. Raises: ValueError, TypeError.
    """
    found = dict(options)
    completed(policy_loss, found)  # refuses a name that it does not know
    refuse(found, (*PER_CALL, *OF_THE_MODEL, "group_size"), "", "be left out, got a value; it comes with each batch")
    checks.one_of("backend", found.get("backend", "auto"), BACKENDS)
    if found.get("objective", "gft") != "gft":
        raise ValueError(
            f"objective must be 'gft' with rows, got {found['objective']!r}; rows bring an advantage and no "
            "log-probability of the policy that sampled them"
        )
    if found.get("reduction", "token-mean") != "token-mean":
        raise ValueError(
            f"reduction must be 'token-mean' with rows, got {found['reduction']!r}; their trainers make a step one "
            "mean over its tokens"
        )
    one_row = torch.zeros(1, 1)
    rehearsed = {name: value for name, value in found.items() if name != "backend"}  # the model's device is not here
    policy_loss(one_row, torch.zeros(1, dtype=torch.int64), weight=one_row, advantages=torch.ones(1), **rehearsed)
    return found


def patch_for_rows(model: nn.Module, *, counted: bool = True, **loss_options: Any) -> nn.Module:
    """`patch_model` with a stricter guard: what a host forgets to pass on is an error, not another loss.

    With labels every batch must bring `gft_advantages` (a list of numbers becomes a tensor). Where the host is
    `counted` upon to count the tokens of a step, a training batch must bring `num_items_in_batch` as well.

    Returns: model. Raises: as `patch_model`; later, in a call: ValueError.
    """
    patch_model(model, **loss_options)
    inner = unwrapped(model)
    # On the outermost module: PEFT's wrappers call the forward of what they wrap, past its hooks.
    inner._gft_forward.guard.require(model, partial(complete_batch, counted and inner.accepts_loss_kwargs))
    return model


def complete_batch(counted: bool, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict[str, Any]]:
    """A call's arguments with the column as a tensor. Raises ValueError for labels without what belongs to them."""
    labels, advantages = kwargs.get("labels"), kwargs.get(COLUMN)
    if labels is None:
        return args, kwargs
    if advantages is None or (isinstance(advantages, list) and None in advantages):
        raise ValueError(
            f"{COLUMN} must come with every row of a batch of labels, got {', '.join(kwargs)}; the trainer has "
            "dropped the column on its way from the data: see its page in the documentation"
        )
    if counted and module.training and kwargs.get("num_items_in_batch") is None:
        raise ValueError(
            "num_items_in_batch must come with every training batch, got None; without the tokens of the whole "
            "step each micro-batch would be a mean of its own"
        )
    return args, {**kwargs, COLUMN: torch.as_tensor(advantages, dtype=torch.float32, device=labels.device)}
