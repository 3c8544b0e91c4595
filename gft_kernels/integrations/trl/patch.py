"""What both trainers ask of a TRL trainer: the loss from inside its model's head, and means of what that says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gft_kernels.model.columns import IGNORE
from gft_kernels.model.patch import patch_model, unwrapped
from gft_kernels.options import TokenStats


def patch_trainer(trainer: Any, **loss_options: Any) -> None:
    """Patch the model of a TRL trainer. Raises ValueError for a router loss, which TRL weighs by its own option."""
    if trainer.aux_loss_enabled:
        raise ValueError(
            f"router_aux_loss_coef must be 0.0, got {trainer.router_aux_loss_coef}; the GFT loss has no router term."
        )
    text_config = trainer.model.config.get_text_config()
    if hasattr(text_config, "output_router_logits"):
        text_config.output_router_logits = False  # or the model would add the term by the weight of its own config
    options = trainer.args
    statistics = {"return_stats": options.token_metrics, "return_entropy": options.token_metrics}
    own = {name: getattr(options, name) for name in ("tau", "backend", "filter_eps")}
    patch_model(trainer.model, **{**own, "ignore_index": IGNORE, **statistics, **loss_options})


def parameters_of(model: nn.Module) -> Any:
    """The names a model's forward takes, below every wrapper."""
    return unwrapped(model)._gft_forward.__signature__.parameters


def token_means(stats: TokenStats, live: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean pi, rectified fraction and entropy by name: values per token, and the tokens that count."""
    assert stats.entropy is not None
    values = {"pi": stats.log_probs.exp(), "rectified": (stats.coefficients < 1).float(), "entropy": stats.entropy}
    return {name: (value, live) for name, value in values.items()}


@torch.no_grad()
def log_means(trainer: Any, means: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Put means over the tokens of all ranks among TRL's own; a mean of no token is left out."""
    sums = torch.stack([torch.stack([torch.where(live, v, 0.0).sum(), live.sum()]) for v, live in means.values()])
    metrics = trainer._metrics["train" if trainer.model.training else "eval"]
    for name, (total, count) in zip(means, trainer.accelerator.reduce(sums, reduction="sum").tolist(), strict=True):
        if count:
            metrics[name].append(total / count)
