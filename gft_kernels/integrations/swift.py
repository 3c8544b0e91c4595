"""ms-swift: in a file given to `--external_plugins`, `register(tau=0.7)`; on the command line, `--callbacks gft`.

ms-swift computes a loss of `loss_map` from the logits and shows it no column of the data, so the loss is put into the
model instead, by a callback. ms-swift then weighs the mean of a micro-batch by the micro-batch's share of the step's
tokens, over all ranks, as it does with the model's own loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from swift.callbacks import TrainerCallback, callbacks_map

from gft_kernels.data.fields import OF_THE_TEMPLATE
from gft_kernels.integrations.response_rows import COLUMN, check_loss_options, patch_for_rows

# Settings under which ms-swift would lose the column, cut rows apart, or compute a loss of its own.
_REQUIRED_OF_THE_TEMPLATE = {
    "remove_unused_columns": (False, f"the column {COLUMN} must stay: --remove_unused_columns false"),
    "packing": (False, "packed rows lose their columns: leave --packing out"),
    "padding_free": (False, "flattened rows lose their columns: leave --padding_free out"),
    "sequence_parallel_size": (1, "it cuts rows into pieces that the loss does not see whole"),
}
_REQUIRED_OF_THE_ARGUMENTS = {
    "loss_type": (None, "it would take the place of the GFT loss"),
    "enable_dft_loss": (False, "GFT with tau = 1 is DFT"),
    "enable_channel_loss": (False, "it needs the logits, which the GFT loss does not hold"),
    "average_tokens_across_devices": (True, "each rank would divide by its own tokens"),
    "label_smoothing_factor": (0.0, "the GFT loss has no smoothed targets"),
}


def register(name: str = "gft", **loss_options: Any) -> None:
    """Make the callback `name` known to ms-swift, with options of `policy_loss` for every batch.

    Raises: ValueError, TypeError.
    """
    options = check_loss_options(loss_options)

    class GFTCallback(TrainerCallback):
        """Checks the settings when the trainer is made and puts the GFT loss into its model."""

        def __init__(self, args: Any, trainer: Any):
            super().__init__(args, trainer)
            check_settings(args, trainer.template)
            args.use_logits_to_keep = False  # the loss leaves out prompts by itself, from labels of the whole row

        def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            patch_for_rows(model, counted=False, **options)

    callbacks_map[name] = GFTCallback


def check_settings(args: Any, template: Any) -> None:
    """Raises ValueError naming the first setting with which ms-swift would train on another loss than GFT's."""
    for owner, required in ((template, _REQUIRED_OF_THE_TEMPLATE), (args, _REQUIRED_OF_THE_ARGUMENTS)):
        for name, (value, reason) in required.items():
            if getattr(owner, name) != value:
                raise ValueError(f"{name} must be {value} with GFT, got {getattr(owner, name)!r}; {reason}")
    if args.use_logits_to_keep:
        raise ValueError("use_logits_to_keep must be unset with GFT, got True; it shortens the labels")


def message_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `response_rows` as ms-swift reads them: `messages` and `gft_advantages`, and no other column.

    A prompt that is text becomes a message of the user. Earlier turns of the assistant are marked `loss: False`, since
    ms-swift trains on those of the whole conversation. Every column that stays reaches the model, so others would be
    arguments it does not know.
    Raises: ValueError for a row with variables or tools of the chat template, which would not see them.
    """
    found = []
    for row in rows:
        for name in OF_THE_TEMPLATE:
            if row.get(name):
                raise ValueError(
                    f"rows must have no `{name}` with ms-swift, got {row[name]!r:.60}; write it into a system message"
                )
        prompt = row["prompt"]
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        asked = [{**message, "loss": False} if message["role"] == "assistant" else message for message in asked]
        answer = {"role": "assistant", "content": row["response"]}
        found.append({"messages": [*asked, answer], COLUMN: row[COLUMN]})
    return found
