"""One rollout for several optimizer steps: their groups sampled at once, and the policy that sampled them remembered.

A window is what one optimizer step trains on: the micro-batches of its gradient accumulation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from gft_kernels.trainer.groups import Group, collate


@dataclass
class Window:
    """The groups of one optimizer step, those without responses left out, and its micro-batches as tensors."""

    groups: list[Group]
    micro_batches: list[dict[str, Tensor]]


def window_of(groups: Iterator[Group], batches: Sequence[Sequence], pad_id: int) -> Window:
    """The window of `batches` of rows, whose groups come next."""
    parts = [[next(groups) for _ in batch] for batch in batches]
    return Window([g for part in parts for g in part if g.responses], [collate(part, pad_id) for part in parts])


class Queue:
    """Windows that are sampled and not yet trained on; those of an epoch that was broken off are forgotten."""

    def __init__(self):
        self.windows: list[Window] = []
        self.source: Iterator | None = None

    def is_empty(self, source: Iterator) -> bool:
        if self.source is not source:
            self.windows, self.source = [], source
        return not self.windows
