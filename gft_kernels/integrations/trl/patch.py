"""What both trainers ask of a TRL trainer's model: the loss from inside its head, and means of its statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gft_kernels.integrations.hf import patch_model, unwrapped
from gft_kernels.options import TokenStats
from gft_kernels.trainer.groups import IGNORE


def patch_trainer(trainer: Any, **loss_options: Any) -> None:
    """Patch the model of a TRL trainer. TRL's fused head stays: calls that ask for it pass the patch.

    Raises: ValueError for a router loss, which TRL weighs by an option of its own.
    """
    if trainer.aux_loss_enabled:
        raise ValueError(
            f"router_aux_loss_coef must be 0.0, got {trainer.router_aux_loss_coef}; the GFT loss has no router term."
        )
    options = trainer.args
    statistics = {"return_stats": options.token_metrics, "return_entropy": options.token_metrics}
    given = {"tau": options.tau, "backend": options.backend, "ignore_index": IGNORE, **statistics, **loss_options}
    patch_model(trainer.model, **given)


def parameters_of(model: nn.Module) -> Any:
    """The names a model's forward takes, below every wrapper."""
    return unwrapped(model).forward.__signature__.parameters


@torch.no_grad()
def add_token_means(trainer: Any, mode: str, stats: TokenStats, live: Tensor) -> None:
    """Mean pi, rectified fraction and entropy over the live tokens of all ranks, under TRL's own means."""
    assert stats.entropy is not None
    values = (stats.log_probs.exp(), (stats.coefficients < 1).float(), stats.entropy)
    sums = torch.stack([live.sum().float(), *((value * live).sum() for value in values)])
    count, *totals = trainer.accelerator.reduce(sums, reduction="sum").tolist()
    for name, total in zip(("pi", "rectified", "entropy"), totals, strict=True):
        trainer._metrics[mode][name].append(total / max(count, 1.0))
