"""Evaluation of a GFTTrainer: responses sampled for held-out prompts, and the likelihood of their demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from gft_kernels.data.rows import Row
from gft_kernels.trainer.config import GFTConfig
from gft_kernels.trainer.groups import IGNORE, Group, GroupBuilder, collate

TRAINING, EVALUATION = 0, 1  # what a step's random numbers are for


class HeldOut(Trainer):
    """The part of GFTTrainer that evaluates."""

    args: GFTConfig
    builder: GroupBuilder
    _eval_batches = 0

    def with_loss(self, model, inputs, **options) -> tuple[Any, Tensor]:
        raise NotImplementedError

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """One line per row of the list `inputs`, in the order that heldout_summary reads.

        The loss is left to the summary over the whole set: a mean of batch means would depend on the batch size.
        """
        args, builder = self.args, self.builder
        entropy = (args.seed, EVALUATION, self._eval_batches, args.process_index)
        self._eval_batches += 1
        sampled = builder.sample(self.model, inputs, args.eval_num_generations, args.eval_temperature, entropy)
        lines = [
            [
                sum(r.ids[-1] not in builder.eos_ids for r in responses) / len(responses),
                sum(len(r.ids) for r in responses) / len(responses),
                *self._mean_rewards(row, responses),
            ]
            for row, responses in zip(inputs, sampled, strict=True)
        ]
        expert_B2 = self._expert_log_probs(model, inputs)
        lines_BX = torch.cat([expert_B2, torch.tensor(lines, dtype=torch.float32, device=expert_B2.device)], 1)
        return None, lines_BX, torch.zeros(len(inputs), device=expert_B2.device)

    def evaluate(self, *args, **kwargs):
        self._eval_batches = 0  # the same random numbers in every evaluation
        return super().evaluate(*args, **kwargs)

    def _mean_rewards(self, row, responses) -> list[float]:
        """The weighted reward, then each function's own, averaged over one row's responses."""
        if not self.builder.rewards:
            return [0.0]
        totals, parts = self.builder.rewards.score([row] * len(responses), [r.text for r in responses])
        counted = [[value or 0.0 for value in part] for part in parts]
        return [sum(values) / len(values) for values in (totals, *counted)]

    def _expert_log_probs(self, model, rows: Sequence[Row]) -> Tensor:
        """Summed log-probability (nats, temperature 1) and token count of each row's expert response, (B, 2)."""
        experts = [Group(row, [max(row.given, key=expert_order)]) for row in rows if row.given]
        out_B2 = torch.zeros(len(rows), 2, device=self.args.device)
        if experts:
            inputs = self._prepare_inputs(collate(experts, self.builder.pad_id))
            with torch.no_grad():
                outputs, _ = self.with_loss(model, inputs, gft_temperature=1.0, gft_return_stats=True)
            where = [i for i, row in enumerate(rows) if row.given]
            out_B2[where, 0] = outputs.stats.log_probs.sum(1)
            out_B2[where, 1] = (inputs["targets"] != IGNORE).sum(1).float()
        return out_B2


def expert_order(response) -> tuple[bool, float]:
    """The expert first; among offline responses the best rewarded."""
    return response.source == "expert", response.reward if response.source == "offline" else 0.0
