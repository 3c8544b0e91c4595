"""axolotl: `plugins: [gft_kernels.integrations.axolotl.GFTPlugin]`, the loss's options under `gft:`.

The plugin patches the model, brings the trainer that counts the tokens of a step, and reads rows of `response_rows`
with the dataset type `gft_kernels.integrations.axolotl`. Only axolotl imports this file.
"""

from __future__ import annotations

import functools
from typing import Any

from axolotl.integrations.base import BasePlugin
from axolotl.prompt_tokenizers import PromptTokenizingStrategy
from pydantic import BaseModel, field_validator, model_validator

from gft_kernels.integrations.response_rows import CarryAdvantages, check_loss_options, encode_row, patch_for_rows
from gft_kernels.model.patch import unwrapped

# What makes axolotl compute another loss, or is said of prompts that `ResponseRows` leaves out of every loss.
_REFUSED = (
    "rl", "reward_model", "process_reward_model", "use_eaft", "orpo_alpha", "label_smoothing_factor", "train_on_inputs",
)  # fmt: skip
_CUTS_ROWS = ("context_parallel_size", "sequence_parallel_degree")  # the second is axolotl's old name of the first


class GFTArgs(BaseModel):
    """The part of an axolotl configuration that is about GFT."""

    gft: dict[str, Any] = {}

    @field_validator("gft")
    @classmethod
    def _options_of_the_loss(cls, gft: dict[str, Any]) -> dict[str, Any]:
        return check_loss_options(gft)

    @model_validator(mode="before")
    @classmethod
    def _nothing_that_takes_its_place(cls, config: Any) -> Any:
        for name in _REFUSED:
            if config.get(name):
                raise ValueError(f"{name} must be unset with the GFT plugin, got {config[name]!r}; remove one")
        for name in _CUTS_ROWS:
            if (config.get(name) or 1) > 1:
                raise ValueError(
                    f"{name} must be 1 with the GFT plugin, got {config[name]}; it cuts rows into pieces that the loss "
                    "does not see whole"
                )
        return config


class GFTPlugin(BasePlugin):
    """GFT inside axolotl's own fine-tuning."""

    def get_input_args(self) -> str:
        return f"{__name__}.GFTArgs"

    def post_model_load(self, cfg: Any, model: Any) -> None:
        patch_for_rows(model, **dict(cfg.gft or {}))

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        return {"average_tokens_across_devices": True}  # axolotl's default counts the tokens of each rank for itself

    def get_trainer_cls(self, cfg: Any) -> type:
        return trainer_class()


@functools.cache
def trainer_class() -> type:
    """axolotl's trainer, so that advantages pass its collators and a step is one mean over its tokens.

    Made when it is asked for: axolotl reads its plugins before its trainers can be imported.
    """
    from axolotl.core.trainers.base import AxolotlTrainer

    class GFTAxolotlTrainer(AxolotlTrainer):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            # It asks the trunk's forward for num_items_in_batch, which no trunk takes, and then does not count.
            self.model_accepts_loss_kwargs = unwrapped(self.model).accepts_loss_kwargs
            side = self.processing_class.padding_side
            for name in ("data_collator", "train_data_collator", "eval_data_collator"):
                collator = getattr(self, name)
                if collator is not None:
                    setattr(self, name, CarryAdvantages(collator, side))

    return GFTAxolotlTrainer


class ResponseRows(PromptTokenizingStrategy):
    """Tokenises `prompt` (text or messages) and `response`, and keeps `gft_advantages`."""

    def tokenize_prompt(self, prompt: dict[str, Any]) -> dict[str, Any]:
        return encode_row(prompt, self.tokenizer)  # rows that are too long are axolotl's to drop


def load(tokenizer: Any, cfg: Any) -> ResponseRows:
    """The entry point of the dataset type."""
    return ResponseRows(None, tokenizer, cfg.train_on_inputs, cfg.sequence_len)
