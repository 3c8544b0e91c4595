"""axolotl's trainer, so that advantages pass its collators and a step is one mean over its tokens."""

from __future__ import annotations

from typing import Any

from axolotl.core.trainers.base import AxolotlTrainer

from gft_kernels.integrations.response_rows import CarryAdvantages
from gft_kernels.model.patch import unwrapped


class GFTAxolotlTrainer(AxolotlTrainer):
    """AxolotlTrainer for a model that GFTPlugin has patched."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # AxolotlTrainer asks the trunk's forward for num_items_in_batch, which no trunk takes, and then does not count.
        self.model_accepts_loss_kwargs = unwrapped(self.model).accepts_loss_kwargs
        side = self.processing_class.padding_side
        for name in ("data_collator", "train_data_collator", "eval_data_collator"):
            collator = getattr(self, name)
            if collator is not None:
                setattr(self, name, CarryAdvantages(collator, side))
