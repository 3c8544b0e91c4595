"""The policy that the KL is taken to: a frozen copy of the starting weights, which may follow the policy."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from gft_kernels.model.patch import unwrapped
from gft_kernels.trainer.engines import named_weights

FILE = "reference.safetensors"


def start_model(model: nn.Module, device: torch.device) -> nn.Module:
    """A frozen copy of a patched model as it is now, whole on this rank. Raises ValueError where it is not whole."""
    if any(p.numel() == 0 for p in model.parameters()):
        raise ValueError(
            "zero3_init_flag must be false with log_kl or beta, got a model whose weights are elsewhere; "
            "every rank keeps a whole copy of the starting weights."
        )
    return copy.deepcopy(model).requires_grad_(False).eval().to(device)


class FollowsPolicy(TrainerCallback):
    """Every `ref_model_sync_steps` the copy becomes α·policy + (1 - α)·copy; a checkpoint holds what it has become.

    Of an adapted model what is trained alone moves. Source: TR-DPO, arXiv 2404.09656; names as in TRL.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def moving(self) -> dict[str, torch.Tensor]:
        """The copy's weights that move, by name."""
        trained = {name for name, p in unwrapped(self.trainer.model).named_parameters() if p.requires_grad}
        named = unwrapped(self.trainer.start_model).named_parameters()
        return {name: parameter.data for name, parameter in named if name in trained}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.ref_model_sync_steps == 0:
            copies = self.moving()
            for name, weight in named_weights(self.trainer.model):
                if name in copies:
                    copies[name].lerp_(weight.to(copies[name]), args.ref_model_mixup_alpha)

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if args.should_save and folder.is_dir():
            save_file(self.moving(), folder / FILE)

    def restore(self, checkpoint: str) -> None:
        """Raises FileNotFoundError for a checkpoint of a run whose copy did not move."""
        for name, weight in load_file(Path(checkpoint, FILE), device=str(self.trainer.args.device)).items():
            self.moving()[name].copy_(weight)
