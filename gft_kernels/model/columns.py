"""Labels and what belongs to each token, aligned with the rows a model's output head sees: row t predicts token t + 1.

Sizes: S responses, L tokens of a row, T rows of it the head sees (all L, or those of logits_to_keep), R = S·T.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PER_TOKEN = ("advantages", "mask", "sequence_ids", "old_log_probs", "ref_log_probs")
PER_CALL = ("rewards", "group_ids", "num_items_in_batch", *PER_TOKEN)


def aligned_columns(
    labels: Tensor | None, shift_labels: Tensor | None, options: dict[str, Any], keep: int | Tensor, states: Tensor
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Head inputs or outputs (S, T, ·), their targets (S, T), and the options with their tensors next to them.

    `labels` and the columns of its shape are shifted here; `shift_labels` and its columns are aligned already.
    With sequence_ids everything comes back as packed rows: (R, ·), (R,).
    """
    ignore = options.get("ignore_index", -100)
    given = labels if shift_labels is None else shift_labels
    assert given is not None

    def align(column: Tensor, fill) -> Tensor:
        if column.shape != given.shape:  # one value per response
            return column.to(states.device)
        return (column if shift_labels is not None else kept(shifted(column, fill), keep)).to(states.device)

    targets_ST = align(given, ignore)
    if states.shape[:-1] != targets_ST.shape:
        raise ValueError(
            f"labels must cover the {tuple(states.shape[:-1])} rows of the output head, got labels for "
            f"{tuple(targets_ST.shape)}; pass labels of the shape of input_ids, or shift_labels of one per row"
        )
    aligned = dict(options)
    for name, value in options.items():
        if isinstance(value, Tensor):
            aligned[name] = align(value, 0) if name in PER_TOKEN else value.to(states.device)
    if options.get("sequence_ids") is None:
        return states, targets_ST, aligned
    for name in PER_TOKEN:
        value = aligned.get(name)
        if isinstance(value, Tensor) and value.shape == targets_ST.shape:
            aligned[name] = value.flatten()
    return states.flatten(0, 1), targets_ST.flatten(), aligned


def shifted(column_SL: Tensor, fill) -> Tensor:
    """Each row's token t + 1 in place t; the last place is filled, for nothing comes after it."""
    return torch.cat([column_SL[:, 1:], column_SL.new_full((column_SL.shape[0], 1), fill)], 1)


def kept(column_SL: Tensor, keep: int | Tensor) -> Tensor:
    """The positions of `logits_to_keep`: the last so many (0: all), or those of a list of positions."""
    if isinstance(keep, Tensor):
        if keep.dim() != 1:
            raise ValueError(
                f"logits_to_keep must be a number or a list of positions with labels, got shape {tuple(keep.shape)}; "
                "pass shift_labels, one per row that is kept"
            )
        return column_SL[:, keep.to(column_SL.device)]
    return column_SL[:, -keep:] if keep else column_SL
