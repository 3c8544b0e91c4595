"""Whether a run computes a group's prompt once: what is asked for, what model and layout allow, what pays."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from gft_kernels.model import shared_prompts
from gft_kernels.trainer.config import GFTConfig
from gft_kernels.trainer.groups import Group

logger = logging.getLogger(__name__)
WORTHWHILE = 0.9  # of the tokens of whole rows; a second pass through the layers costs what some tokens do


class Sharing:
    """`share_prompts` of a run. Raises ValueError, with the reason, where it is True and cannot be.

    model: the language model inside its wrappers. `reason`: why its training computes whole rows, or None. `samples`:
    whether sampling computes each prompt once.
    """

    def __init__(self, args: GFTConfig, model: Any, accelerator):
        self.asked, self.tells, self.told = args.share_prompts, args.should_log, False
        self.samples, self.reason = False, None
        if self.asked is False:
            return
        kept = refusal_of_wrapper(accelerator) or shared_prompts.refusal_of_cache(model)
        kept = kept or shared_prompts.refusal_of_trial(model)
        self.samples = kept is None
        self.reason = kept or refusal_of_run(args) or shared_prompts.refusal_of_loss(model, training=True)
        if self.asked is True and self.reason is not None:
            raise ValueError(f"share_prompts must be 'auto' or False here, got True; {self.reason}.")
        if self.reason is not None:
            self._tell(self.reason)

    def applies(self, groups: Sequence[Group]) -> bool:
        """Whether the prompts of this micro-batch are computed once: 'auto' counts the tokens that pass the layers."""
        pairs = [(len(g.row.prompt_ids), len(r.ids)) for g in groups for r in g.responses]
        if self.asked is False or self.reason is not None or not pairs:
            return False
        prompts = max(prompt for prompt, _ in pairs) * sum(bool(g.responses) for g in groups)
        shared = prompts + len(pairs) * max(response for _, response in pairs)
        whole = len(pairs) * max(map(sum, pairs))
        if self.asked is True or shared <= WORTHWHILE * whole:
            return True
        if not self.told:
            self._tell(f"a micro-batch of {whole} tokens would be one of {shared}, too little to gain (told once)")
        self.told = True
        return False

    def _tell(self, reason: str) -> None:
        if self.tells:
            logger.warning("share_prompts: training computes prompts with every response, for %s", reason)


def refusal_of_wrapper(accelerator) -> str | None:
    """Why what is wrapped around the model cannot serve a cache of its prompts."""
    kind = str(accelerator.distributed_type).rpartition(".")[2]
    if kind in ("FSDP", "DEEPSPEED"):
        return f"{kind} gathers weights, or reduces gradients, once for each call of a layer"
    return None


def refusal_of_run(args: GFTConfig) -> str | None:
    """Why this run, whatever its model, cannot train on shared prompts."""
    if args.torch_compile:
        return "torch_compile would compile for every length of a prompt"
    if args.gradient_checkpointing:
        return "gradient checkpointing runs layers again without their cache"
    if args.neftune_noise_alpha:
        return "neftune_noise_alpha draws noise anew for each row in training"
    return None
