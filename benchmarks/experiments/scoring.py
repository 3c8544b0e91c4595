"""Exact statistics of a policy at the tokens of given responses. Sizes: S responses, T positions, V vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gft_kernels.data.fields import OWN_FIELDS
from gft_kernels.data.rows import Response, Row
from gft_kernels.data.text import encode_prompt, encode_response
from gft_kernels.trainer.groups import IGNORE, Group, collate

LOGITS_AT_ONCE = 1 << 26


def prompt_row(tokenizer, record: dict) -> Row:
    """The record's prompt and the columns rewards read, without its demonstrations."""
    columns = {name: value for name, value in record.items() if name not in OWN_FIELDS}
    return Row(record["prompt"], encode_prompt(tokenizer, record["prompt"]), [], columns)


def demonstration(tokenizer, record: dict, number: int = 0) -> Group:
    """The record's prompt with one of its demonstrations."""
    text = record["demonstrations"][number]
    return Group(prompt_row(tokenizer, record), [Response(text, encode_response(tokenizer, text), "expert")])


@torch.no_grad()
def log_probs(model, groups: Sequence[Group]) -> Tensor:
    """log π of every response token, one after the other (nats)."""
    found = []
    for inputs, live_ST in _batches(model, groups):
        log_STV = _log_softmax(model, inputs)
        targets_ST1 = inputs["targets"].clamp(min=0)[..., None]
        found.append(log_STV.gather(-1, targets_ST1).squeeze(-1)[live_ST])
    return torch.cat(found)


@torch.no_grad()
def entropy_and_kl(model, reference, groups: Sequence[Group]) -> tuple[float, float]:
    """Means over response tokens of the entropy of the model and of its exact KL to the reference (nats)."""
    entropy = divergence = tokens = 0.0
    for inputs, live_ST in _batches(model, groups):
        log_STV, other_STV = _log_softmax(model, inputs), _log_softmax(reference, inputs)
        probs_STV = log_STV.exp()
        entropy -= float((probs_STV * log_STV).sum(-1)[live_ST].sum())
        divergence += float((probs_STV * (log_STV - other_STV)).sum(-1)[live_ST].sum())
        tokens += int(live_ST.sum())
    return entropy / tokens, divergence / tokens


def _batches(model, groups) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    single = [Group(group.row, [response]) for group in groups for response in group.responses]
    longest = max(len(group.row.prompt_ids) + len(group.responses[0].ids) for group in single)
    at_once = max(1, LOGITS_AT_ONCE // (longest * model.config.vocab_size))
    for start in range(0, len(single), at_once):
        inputs = collate(single[start : start + at_once], pad_id=0)
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        yield inputs, inputs["targets"] != IGNORE


def _log_softmax(model, inputs) -> Tensor:
    kept = inputs["targets"].shape[1] + 1
    out = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], logits_to_keep=kept)
    return torch.log_softmax(out.logits[:, :-1].float(), -1)
