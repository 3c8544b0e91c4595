"""LLaMA-Factory: `run_exp(args, callbacks=[GFTCallback(tau=0.7)])`, over rows written by `write_tokenised`.

LLaMA-Factory's own reading of data keeps no column it does not know, so the rows are tokenised beforehand and named by
its option `tokenized_path`. A `compute_loss_func` would be handed the logits and no column, so the loss is put into
the model, which the callback is shown when the trainer is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from gft_kernels.integrations.response_rows import check_loss_options, encode_row, patch_for_rows


class GFTCallback(TrainerCallback):
    """Puts the GFT loss into the model of the trainer it is given to; options of `policy_loss` for every batch."""

    def __init__(self, **loss_options: Any):
        self.options = check_loss_options(loss_options)

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not args.average_tokens_across_devices:
            raise ValueError(
                "average_tokens_across_devices must be True with GFT, got False; each rank would divide by its own "
                "tokens"
            )
        patch_for_rows(model, **self.options)


def write_tokenised(
    folder: str | Path, rows: Iterable[Mapping[str, Any]], tokenizer: Any, max_length: int | None = None
) -> None:
    """Rows of `response_rows` as the token ids that `tokenized_path: folder` reads, in its split `train`.

    Raises: ValueError for a row of more than max_length tokens.
    """
    from datasets import Dataset, DatasetDict

    encoded = [encode_row(row, tokenizer, max_length) for row in rows]
    DatasetDict({"train": Dataset.from_list(encoded)}).save_to_disk(str(folder))
