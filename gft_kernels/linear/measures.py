"""What sparse products measure first of a logits' gradient: rows' sizes, sums over groups of rows; in torch.

Each is one look at every entry. Triton has twins of both.

Sizes: R rows, P of a panel, V vocabulary, N groups of rows.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from gft_kernels import backends

PANEL = {"cpu": 8}  # rows that a CPU looks at at a time: its cache still holds them at the next operation
LAUNCH = 512  # elsewhere, where each operation is a launch


def measures_of(backend: str, device: torch.device) -> Any:
    """Triton's where its kernels run, unless the call is for another backend's own text; else this module."""
    if backend == "triton" or (device.type == "cuda" and backend != "reference"):
        triton = backends.named("triton")
        if triton.absent() is None and triton.refuses_device(device) is None:
            return triton
    return sys.modules[__name__]


def row_sizes(rows_RV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row the size of its largest entry and, in units of that, its sum and its sum of squares; float32 (R,)."""
    top_R, sum_R, square_R = rows_RV.new_empty(3, len(rows_RV), dtype=torch.float32)
    panel_PV = _panel(rows_RV)
    size = len(panel_PV)
    for panel, top, total, square in zip(*(x.split(size) for x in (rows_RV, top_R, sum_R, square_R)), strict=True):
        top.copy_(torch.maximum(panel.amax(1), -panel.amin(1)))
        unit = torch.where(top > 0.0, 1.0 / top, 0.0)
        scaled = torch.mul(panel, unit[:, None], out=panel_PV[: len(panel)])
        torch.sum(scaled, 1, out=total)
        torch.sum(scaled.square_(), 1, out=square)
    return top_R, sum_R, square_R


def group_sums(rows_RV: Tensor, group: int, factor_R: Tensor, squared: bool = False) -> Tensor:
    """Of each `group` rows the sum of factor·row, or of (factor·row)²; float32 (N, V), the last of the rows left."""
    sum_NV = rows_RV.new_zeros(-(-len(rows_RV) // group), rows_RV.shape[1], dtype=torch.float32)
    panel_PV = _panel(rows_RV) if squared else None
    for sum_V, rows, factor in zip(sum_NV, rows_RV.split(group), factor_R.split(group), strict=True):
        if panel_PV is None:
            torch.mv(rows.float().t(), factor, out=sum_V)
            continue
        ones_P = factor.new_ones(len(panel_PV))
        for panel, f in zip(rows.split(len(panel_PV)), factor.split(len(panel_PV)), strict=True):
            scaled = torch.mul(panel, f[:, None], out=panel_PV[: len(panel)])
            sum_V.addmv_(scaled.square_().t(), ones_P[: len(panel)])
    return sum_NV


def _panel(rows_RV: Tensor) -> Tensor:
    """One buffer for all panels: the allocator would fetch new memory for each."""
    rows = min(len(rows_RV), PANEL.get(rows_RV.device.type, LAUNCH))
    return rows_RV.new_empty(max(rows, 1), rows_RV.shape[1], dtype=torch.float32)
