"""TRL's SFTTrainer with C(pi): SFT, DFT or what lies between, without logits."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from trl import SFTTrainer

from gft_kernels.integrations.trl.config import GFTSFTConfig
from gft_kernels.integrations.trl.patch import log_means, patch_trainer, token_means
from gft_kernels.model.columns import IGNORE, shifted


class GFTSFTTrainer(SFTTrainer):
    """trl.SFTTrainer whose token losses are C(pi)·(-log pi): tau 0 is its "nll", tau 1 its "dft".

    Takes its arguments but `compute_loss_func`; logs mean pi and the rectified fraction in place of the token
    accuracy, which needs the logits. Source: docs/integrations/trl.md.
    """

    args: GFTSFTConfig
    model: Any
    _metrics: Any

    def __init__(self, model, args: GFTSFTConfig | None = None, **arguments):
        if not isinstance(args, GFTSFTConfig):
            raise TypeError(f"args must be a gft_kernels.integrations.trl.GFTSFTConfig, got {type(args).__name__}.")
        if arguments.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func must be left out, got a value; the loss is GFT's.")
        super().__init__(model, args, **arguments)
        if getattr(self.accelerator, "parallelism_config", None) is not None:
            raise ValueError("parallelism_config must be absent, got one; only data parallelism is supported.")
        patch_trainer(self)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's scaling of another loss; with `return_outputs` the logits take a second forward, as in TRL."""
        outputs = model(**inputs, use_cache=False, num_items_in_batch=num_items_in_batch)
        loss = outputs.loss
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the count is of all ranks, and gradients are averaged
        if self.args.token_metrics:
            live_ST = shifted(inputs["labels"], IGNORE) != IGNORE
            virtual = outputs.stats.log_probs.shape[1] - live_ST.shape[1]  # prompt tuning puts tokens before the first
            log_means(self, token_means(outputs.stats, functional.pad(live_ST, (virtual, 0))))
        if self.model.training:
            given = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["position_ids"].numel()
            here = torch.as_tensor(given, device=loss.device)
            self._total_train_tokens += int(self.accelerator.gather(here).sum())
        self._metrics["train" if self.model.training else "eval"]["num_tokens"] = [self._total_train_tokens]
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**{name: value for name, value in inputs.items() if name != "labels"})
