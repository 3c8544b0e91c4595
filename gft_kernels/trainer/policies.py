"""What policies say of micro-batches: the loss of a step, log pi and entropy of its tokens; the one the KL goes to."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import TrainerCallback

from gft_kernels.api import policy_loss
from gft_kernels.data.rows import Row
from gft_kernels.model.columns import IGNORE
from gft_kernels.model.patch import patch_model, unwrapped
from gft_kernels.model.shared_prompts import ARGUMENTS, PROMPT_IDS
from gft_kernels.objectives import PRESETS
from gft_kernels.options import TokenStats
from gft_kernels.trainer.config import OF_THE_LOSS, GFTConfig, has_ratio, tells_given
from gft_kernels.trainer.engines import named_weights
from gft_kernels.trainer.groups import SOURCES, Group, collate
from gft_kernels.trainer.windows import Window

TEXTS = ("input_ids", "attention_mask")
REFERENCE = "reference.safetensors"


def check_backend(args: GFTConfig) -> None:
    """Raises BackendUnavailable, with the reason, for a backend that cannot compute a loss on this run's device."""
    if args.backend != "auto":
        logits = torch.zeros(1, 1, device=args.device)
        policy_loss(logits, torch.zeros_like(logits[0], dtype=torch.int64), objective="sft", backend=args.backend)


class Forward:
    """A model, patched, asked about micro-batches: for the loss of a step, or the log pi of their targets."""

    def __init__(self, args: GFTConfig, model: Any, accelerator, tried_prompts: bool):
        # Where the loss needs logits after all, a model that can will not compute those of the prompts.
        self.keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.args, self.accelerator = args, accelerator
        # What every call has; a training step adds its objective, for others only ask for log-probabilities.
        fixed = {name: getattr(args, name) for name in ("temperature", "backend", "filter_eps")}
        patch_model(model, objective="sft", ignore_index=IGNORE, **fixed)
        model._gft_forward.tried_prompts = tried_prompts  # it has gone on from the cache of a prompt already
        self.objective = {f"gft_{name}": getattr(args, name) for name in (*OF_THE_LOSS, "reduction")}
        self.objective |= {"gft_return_stats": args.token_metrics, "gft_return_entropy": args.token_metrics}

    def __call__(self, model: Any, inputs, **options) -> tuple[Any, Tensor]:
        """The output for the responses' tokens, and the targets (S, T) its statistics have the shape of."""
        if f"gft_{PROMPT_IDS}" in inputs:
            texts = {name: inputs[name] for name in (*TEXTS, *(f"gft_{name}" for name in ARGUMENTS))}
            return model(**texts, shift_labels=inputs["targets"], **options), inputs["targets"]
        length, behind = inputs["input_ids"].shape[1], inputs["targets"].shape[1] + 1
        selection = {"logits_to_keep": behind} if self.keeps_logits else {}
        before = 0 if selection else length - behind
        targets_ST = functional.pad(inputs["targets"], (before, 1), value=IGNORE)
        texts = {name: inputs[name] for name in TEXTS}
        return model(**texts, **selection, shift_labels=targets_ST, **options), targets_ST

    def step(self, model: Any, inputs: dict[str, Tensor], num_items: Any) -> tuple[Any, Tensor]:
        """The same with the loss of a training step, told of each response its advantage, weight, and if it was given.

        And of each token what the policy that sampled said of it, and the one the KL goes to.
        """
        args, told = self.args, dict(self.objective)
        given_S, advantages_S = inputs["sources"] != SOURCES.index("sampled"), inputs["advantages"]
        if args.given_objective is not None and not PRESETS[args.given_objective].weighs:
            advantages_S = torch.where(given_S, 1.0, advantages_S)
        if args.advantages == "group":
            told["gft_advantages"] = advantages_S
        if "uncertain" in inputs:
            told["gft_advantages"] = advantages_S[:, None] * inputs["uncertain"]
        if tells_given(args):
            told["gft_given"] = given_S
        if args.given_weight != 1.0:
            told["gft_weights"] = torch.where(given_S, args.given_weight, 1.0)
        if "old_log_probs" in inputs and has_ratio(args):
            told["gft_old_log_probs"] = inputs["old_log_probs"]
        if "ref_log_probs" in inputs:
            told["gft_ref_log_probs"] = inputs["ref_log_probs"]
        return self(model, inputs, num_items_in_batch=num_items, **told)

    def log_probs(self, model: Any, inputs, **options) -> Tensor:
        """log pi (nats) of each target as the policy samples, without dropout."""
        return self.statistics(model, inputs, **options)[0].log_probs

    @torch.no_grad()
    def statistics(self, model: Any, inputs, **options) -> tuple[TokenStats, Tensor]:
        """What that policy says of each target, and (bool, of the same shape) which are there."""
        training = model.training
        model.eval()
        with self.accelerator.autocast():
            inputs = send_to_device(inputs, self.accelerator.device)
            outputs, targets_ST = self(model, inputs, gft_return_stats=True, **options)
        model.train(training)
        return outputs.stats, targets_ST != IGNORE

    def experts(self, model: Any, rows: Sequence[Row], pad_id: int) -> Tensor:
        """(B, 2): summed log pi (nats, temperature 1) and token count of each row's expert, or its best response."""
        where = [i for i, row in enumerate(rows) if row.given]
        best = [max(rows[i].given, key=lambda r: (r.source == "expert", r.reward)) for i in where]
        out_B2 = torch.zeros(len(rows), 2, device=self.accelerator.device)
        if where:
            inputs = collate([Group(rows[i], [response]) for i, response in zip(where, best, strict=True)], pad_id)
            out_B2[where, 0] = self.log_probs(model, inputs, gft_temperature=1.0).sum(1)
            out_B2[where, 1] = out_B2.new_tensor([len(response.ids) for response in best])
        return out_B2

    def remember(self, window: Window, model: Any, start: Any) -> None:
        """What the policies say of a window's tokens now, into its micro-batches.

        That is log pi of the policy that samples, where later steps differ from it and something asks how far; with
        beta, of `start`, which it is held to; and the share of the tokens that advantages weigh, if that is below 1.
        """
        args, share = self.args, self.args.top_entropy_quantile
        ratios = (args.steps_per_rollout > 1 or args.num_iterations > 1) and (args.token_metrics or has_ratio(args))
        for inputs in window.micro_batches:
            if ratios or share < 1:
                stats, live_ST = self.statistics(model, inputs, gft_return_entropy=share < 1)
                if ratios:
                    inputs["old_log_probs"] = stats.log_probs
                if stats.entropy is not None:
                    inputs["entropies"] = torch.where(live_ST, stats.entropy, -1.0)
            if args.beta:
                inputs["ref_log_probs"] = self.log_probs(start, inputs)
        if share < 1:
            keep_uncertain(window, share, self.accelerator)


def keep_uncertain(window: Window, share: float, accelerator) -> None:
    """Let advantages weigh the tokens whose entropy is among the largest `share` of the step's, over all ranks.

    The smallest of them is the first value at or above the quantile 1 - share. Source: arXiv 2506.01939.
    """
    entropies = [inputs.pop("entropies") for inputs in window.micro_batches]
    here = torch.cat([entropy_ST[entropy_ST >= 0] for entropy_ST in entropies])  # below 0 where no token is
    every = accelerator.gather(accelerator.pad_across_processes(here, pad_index=-1))
    every = every[every >= 0].sort(descending=True).values
    least = every[math.floor((len(every) - 1) * share + 1e-9)] if len(every) else 0.0
    for inputs, entropy_ST in zip(window.micro_batches, entropies, strict=True):
        inputs["uncertain"] = entropy_ST >= least


# The policy that the KL is taken to


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

    def moving(self) -> dict[str, Tensor]:
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
            save_file(self.moving(), folder / REFERENCE)

    def restore(self, checkpoint: str) -> None:
        """Raises FileNotFoundError for a checkpoint of a run whose copy did not move."""
        for name, weight in load_file(Path(checkpoint, REFERENCE)).items():
            self.moving()[name].copy_(weight)
