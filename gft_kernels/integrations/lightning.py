"""Lightning: `StepMean`, the callback that makes an optimizer step one mean over its tokens.

Lightning averages over the micro-batches of a step and over the ranks, and shows a module one micro-batch at a time,
so no micro-batch can know the tokens of its step. With this callback `training_step` returns the *sum* over its tokens
(`reduction="sum"`); before the optimizer steps, and before gradients are clipped, their sum is divided by the tokens of
all micro-batches on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from gft_kernels.model.extra_terms import reduction_of


def label_tokens(batch: Any) -> Tensor:
    """The tokens of a batch that count: labels, shifted by one as the model shifts them, that are not -100."""
    return (batch["labels"][:, 1:] != -100).sum()


class StepMean(Callback):
    """Divides the gradients of a step by its tokens; `tokens(batch)` counts those of a micro-batch, a () tensor."""

    def __init__(self, tokens: Callable[[Any], Tensor] = label_tokens):
        self.tokens = tokens
        self.counted: Tensor | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises ValueError for gradients this callback would not find, and for losses that are no sums."""
        if not pl_module.automatic_optimization:
            raise ValueError(
                "automatic_optimization must be True with StepMean, got False; pass num_items_in_batch to the loss"
            )
        if "DeepSpeed" in type(trainer.strategy).__name__:
            raise ValueError(
                f"strategy must leave gradients in .grad with StepMean, got {type(trainer.strategy).__name__}; "
                "use DDP or FSDP"
            )
        for module in pl_module.modules():
            patch = module.__dict__.get("_gft_forward")
            if patch is not None and reduction_of(patch.options) != "sum":
                raise ValueError(
                    f"reduction must be 'sum' with StepMean, got {reduction_of(patch.options)!r}; pass reduction='sum' "
                    "to patch_model, or a step would be divided twice"
                )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:  # Lightning zeroes gradients here, stepped with or not
            self.counted = None
        tokens = torch.as_tensor(self.tokens(batch), dtype=torch.float32, device=pl_module.device)
        self.counted = tokens if self.counted is None else self.counted + tokens

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        assert self.counted is not None
        tokens = trainer.strategy.reduce(self.counted, reduce_op="sum").clamp(min=1)
        self.counted = None
        # Lightning has divided the losses by the accumulation, in a partial last window as well, and DDP by the ranks.
        scale = trainer.accumulate_grad_batches * trainer.world_size / tokens
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)
