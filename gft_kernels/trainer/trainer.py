"""GFTTrainer: transformers.Trainer whose batches are hybrid groups; the model, patched, computes the loss in its head.

One optimizer step: `get_batch_samples` builds the groups of the whole accumulation window and counts their tokens over
all ranks; `compute_loss` runs the wrapped model on one micro-batch of whole groups and divides by that count.
"""

from __future__ import annotations

import copy
import functools
import inspect
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from gft_kernels.integrations.hf import patch_model
from gft_kernels.trainer.callbacks import RunLog
from gft_kernels.trainer.config import GFTConfig
from gft_kernels.trainer.data import Row, Rows
from gft_kernels.trainer.groups import IGNORE, SOURCES, Group, GroupBuilder, check_sources, collate, count_items
from gft_kernels.trainer.metrics import Means, append_completions, completions_table, heldout_summary
from gft_kernels.trainer.ranks import even_sampler, refuse_layouts
from gft_kernels.trainer.rewards import Rewards
from gft_kernels.trainer.rollouts import end_tokens, generate

TRAINING, EVALUATION = 0, 1  # what a step's random numbers are for


class GFTTrainer(Trainer):
    """Group Fine-Tuning of a causal language model.

    model: a transformers model, or the name or path of one. train_dataset, eval_dataset: lists of rows or
    datasets.Dataset (docs/training.md#rows). reward_funcs: functions, ready names or dotted paths. rollout_fn:
    `f(model, prompts_ids, sampling) -> token ids`, by default `gft_kernels.trainer.generate`.
    Raises: ValueError or RowError before training for what cannot work, RewardError when a reward function fails.
    """

    # compute_loss divides by the whole window's count: Trainer must not divide by the accumulation steps again.
    loss_is_scaled_for_ga = True
    args: GFTConfig
    train_dataset: Rows | None

    def __init__(
        self,
        model,
        args: GFTConfig,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        reward_funcs: Sequence[Callable | str] | Callable | str = (),
        rollout_fn: Callable = generate,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
    ):
        if isinstance(model, str):
            processing_class = processing_class or AutoTokenizer.from_pretrained(model)
            model = AutoModelForCausalLM.from_pretrained(model)
        if processing_class is None or getattr(processing_class, "eos_token_id", None) is None:
            raise ValueError("processing_class must be a tokenizer with an end-of-text token, got none; pass one.")
        rewards = Rewards(reward_funcs, args.reward_weights)
        rows = functools.partial(
            Rows,
            tokenizer=processing_class,
            config=args,
            context=getattr(model.config, "max_position_embeddings", None),
            required_columns=sorted(rewards.required_columns()),
        )
        train_rows = None if train_dataset is None else rows(train_dataset, "train_dataset")
        if train_rows is not None:
            check_sources(args, train_rows, rewards)
        if isinstance(eval_dataset, dict):
            eval_rows: Any = {name: rows(records, f"eval_dataset[{name!r}]") for name, records in eval_dataset.items()}
        else:
            eval_rows = None if eval_dataset is None else rows(eval_dataset, "eval_dataset")
        super().__init__(
            model=model,
            args=args,
            data_collator=keep,  # rows stay rows until their groups are built
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=processing_class,
            compute_metrics=heldout_summary(rewards.names),
            callbacks=[RunLog(), *(callbacks or [])],
            optimizers=optimizers,
        )
        refuse_layouts(args, self.accelerator)
        # Read by transformers before 5.19, where loss_is_scaled_for_ga does not exist yet.
        self.model_accepts_loss_kwargs = True
        self.builder = GroupBuilder(args, processing_class, rewards, rollout_fn, end_tokens(model, processing_class))
        unwrapped = self.accelerator.unwrap_model(self.model)
        self._keeps_logits = "logits_to_keep" in inspect.signature(unwrapped.forward).parameters
        patch_model(
            unwrapped,
            tau=args.tau,
            rectify=args.rectify,
            temperature=args.temperature,
            reduction=args.reduction,
            ignore_index=IGNORE,
            return_stats=args.token_metrics,
            return_entropy=args.token_metrics,
            backend=args.backend,
        )
        self.start_model = copy.deepcopy(model).requires_grad_(False).eval() if args.log_kl else None
        self.means = Means(self.args.device)
        self._last_log, self._eval_batches = time.perf_counter(), 0

    def _get_train_sampler(self, *args, **kwargs):
        sampler = super()._get_train_sampler(*args, **kwargs)
        return sampler if sampler is None else even_sampler(sampler, self.args)

    # One optimizer step

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The window's micro-batches as tensors, and the denominator of its loss over all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        rows = [row for batch in batches for row in batch]
        entropy = (self.args.seed, TRAINING, self.state.global_step, self.args.process_index)
        groups = self.builder.build(self.model, rows, entropy) if rows else []
        present = [group for group in groups if group.responses]
        self.means.add_groups(present, self.builder.eos_ids)
        self._show(present)
        micro_batches, start = [], 0
        for batch in batches:
            micro_batches.append(collate(groups[start : start + len(batch)], self.builder.pad_id))
            start += len(batch)
        num_items = torch.tensor(count_items(groups, self.args.reduction), dtype=torch.float32, device=device)
        return micro_batches, self.accelerator.gather(num_items).sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The micro-batch's share of the step's loss. `model` is the wrapped one: its hooks average gradients."""
        given = {"gft_advantages": inputs["advantages"]} if self.args.advantages == "group" else {}
        outputs, targets_ST = self._with_loss(model, inputs, num_items_in_batch=num_items_in_batch, **given)
        loss, stats = outputs.loss, outputs.stats if self.args.token_metrics else None
        if stats is not None:
            self.means.add_tokens(stats, targets_ST != IGNORE)
        if self.start_model is not None and self._logs_after_this_step():
            self._add_kl(stats, targets_ST, inputs)
        # Data parallelism averages gradients over the ranks, but the denominator is already the sum over ranks.
        loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _with_loss(self, model, inputs, **options) -> tuple[Any, Tensor]:
        """The output of a patched model for the responses' tokens, and the targets its statistics have the shape of."""
        length, behind = inputs["input_ids"].shape[1], inputs["targets"].shape[1] + 1
        # Where the loss needs logits after all, a model that can will not compute those of the prompts.
        selection = {"logits_to_keep": behind} if self._keeps_logits else {}
        before = 0 if selection else length - behind
        targets_ST = functional.pad(inputs["targets"], (before, 1), value=IGNORE)
        texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return model(**texts, **selection, shift_labels=targets_ST, **options), targets_ST

    def _add_kl(self, stats, targets_ST, inputs):
        """Mean over sampled tokens of r - 1 - log r with r = pi_start/pi: unbiased, never negative (nats)."""
        with torch.no_grad():
            start = self._with_loss(self.start_model, inputs)[0].stats
        sampled_S = inputs["sources"] == SOURCES.index("sampled")
        live_ST = (targets_ST != IGNORE) & sampled_S[:, None]
        log_ratio_ST = start.log_probs - stats.log_probs
        self.means.add("kl_to_start", ((log_ratio_ST.expm1() - log_ratio_ST) * live_ST).sum(), live_ST.sum())

    # Reporting

    def _logs_after_this_step(self) -> bool:
        return (self.state.global_step + 1) % max(int(self.state.logging_steps or 1), 1) == 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last training log line."""
        if "loss" in logs:
            now = time.perf_counter()
            logs = {**logs, **self.means.drain(self.accelerator, now - self._last_log)}
            self._last_log = now
        super().log(logs, start_time)

    def _show(self, groups: Sequence[Group]) -> None:
        every, step = self.args.log_completions_steps, self.state.global_step
        if every and step % every == 0 and groups and self.is_world_process_zero():
            append_completions(Path(str(self.args.output_dir), "completions.jsonl"), groups, step)
            print("\n" + completions_table(groups[0], step), flush=True)

    # Evaluation

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
                outputs, _ = self._with_loss(model, inputs, gft_temperature=1.0, gft_return_stats=True)
            where = [i for i, row in enumerate(rows) if row.given]
            out_B2[where, 0] = outputs.stats.log_probs.sum(1)
            out_B2[where, 1] = (inputs["targets"] != IGNORE).sum(1).float()
        return out_B2


def expert_order(response) -> tuple[bool, float]:
    """The expert first; among offline responses the best rewarded."""
    return response.source == "expert", response.reward if response.source == "offline" else 0.0


def keep(rows: list[Row]) -> Any:
    """The collator: rows as they are."""
    return rows
