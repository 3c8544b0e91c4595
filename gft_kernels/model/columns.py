"""Labels and what belongs to each token, aligned with the rows a model's output head sees: row t predicts token t + 1.

Sizes: S responses, L tokens of a row, T rows of it the head sees (all L, or those of logits_to_keep), R = S·T.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gft_kernels import checks
from gft_kernels.model import extra_terms

IGNORE = -100  # the label of a token that does not count, where no other is asked for
PER_TOKEN = ("advantages", "weights", "given", "mask", "sequence_ids", "old_log_probs", "ref_log_probs")
PER_CALL = ("rewards", "group_ids", "num_items_in_batch", *PER_TOKEN)


class Columns:
    """What one call of a patched model brings: its labels, and its options of `policy_loss`.

    `labels` and the columns of its shape are shifted here; `shift_labels` and its columns are aligned already.
    """

    def __init__(self, labels: Tensor | None, shift_labels: Tensor | None, options: dict[str, Any], keep: int | Tensor):
        given = labels if shift_labels is None else shift_labels
        assert given is not None
        self.labels, self.shifts, self.options, self.keep = given, shift_labels is None, options, keep
        if self.shifts and (isinstance(keep, Tensor) or keep) and checks.can_be_read(given):
            self._refuse_lost()

    def beside(self, states: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Head inputs or outputs (S, T, ·), their targets (S, T), and the options with their tensors next to them.

        With sequence_ids everything comes back as packed rows: (R, ·), (R,).
        """
        targets_ST = self._aligned(self.labels, self.options.get("ignore_index", IGNORE)).to(states.device)
        if states.shape[:-1] != targets_ST.shape:
            raise ValueError(
                f"labels must cover the {tuple(states.shape[:-1])} rows of the output head, got labels for "
                f"{tuple(targets_ST.shape)}; pass labels of the shape of input_ids, or shift_labels of one per row"
            )
        options = dict(self.options)
        for name, value in options.items():
            if isinstance(value, Tensor):
                options[name] = (self._aligned(value, 0) if name in PER_TOKEN else value).to(states.device)
        self.targets, self.aligned_options = targets_ST, options
        if options.get("sequence_ids") is None:
            return states, targets_ST, options
        for name in PER_TOKEN:
            value = options.get(name)
            if isinstance(value, Tensor) and value.shape == targets_ST.shape:
                options[name] = value.flatten()
        self.targets = targets_ST.flatten()
        return states.flatten(0, 1), self.targets, options

    def share(self) -> Tensor:
        """What a term beside the loss is multiplied by (extra_terms.py), of the rows last asked for."""
        return extra_terms.share(self.targets, self.aligned_options)

    def _refuse_lost(self) -> None:
        """Raises ValueError for a label that counts while logits_to_keep leaves out the row that predicts it."""
        ignored, mask = self.options.get("ignore_index", IGNORE), self.options.get("mask")
        live_SL = shifted(self.labels, ignored) != ignored
        if isinstance(mask, Tensor) and mask.shape == self.labels.shape:
            live_SL &= shifted(mask, False).to(live_SL)
        live_SL[:, kept(torch.arange(live_SL.shape[1])[None], self.keep)[0]] = False
        if live_SL.any():
            s, t = live_SL.nonzero()[0].tolist()
            raise ValueError(
                "logits_to_keep must keep the row before each label that counts, "
                f"got none for the label at position {t + 1} of row {s}; keep one row more than there are labels to "
                f"learn at the end, or set that label to {ignored}"
            )

    def _aligned(self, column: Tensor, fill) -> Tensor:
        if column.shape != self.labels.shape or not self.shifts:  # one value per response, or aligned already
            return column
        return kept(shifted(column, fill), self.keep)


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
