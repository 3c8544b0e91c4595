"""GFTTrainer: transformers.Trainer whose batches are hybrid groups; the model, patched, computes the loss in its head.

One optimizer step: `get_batch_samples` hands out the groups of the whole accumulation window, sampled together with
those of the next `steps_per_rollout` - 1, and counts their tokens over all ranks; `compute_loss` runs the wrapped model
on one micro-batch of whole groups and divides by that count. Evaluation samples held-out prompts instead, and takes the
likelihood of their demonstrations.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from gft_kernels.data import pretrained
from gft_kernels.data.rows import Limits, Rows
from gft_kernels.model.columns import IGNORE
from gft_kernels.model.patch import unwrapped
from gft_kernels.trainer import peft_adapters, windows
from gft_kernels.trainer.checkpoints import Manifests, SaveOnInterrupt
from gft_kernels.trainer.config import GFTConfig, clip_range
from gft_kernels.trainer.engines import Rollout
from gft_kernels.trainer.groups import GroupBuilder, check_sources, denominator
from gft_kernels.trainer.logs import RunLog, show_completions
from gft_kernels.trainer.metrics import Means, heldout_lines, heldout_summary, signs_of_collapse
from gft_kernels.trainer.policies import FollowsPolicy, Forward, check_backend, start_model
from gft_kernels.trainer.rewards import Rewards
from gft_kernels.trainer.rollouts import end_tokens, refuse_virtual_tokens, seeded

TRAINING, EVALUATION = 0, 1  # what random numbers are for
LOADER = ("num_workers", "pin_memory", "prefetch_factor")  # of every loader; for those of training:
OF_TRAINING = ("drop_last", "persistent_workers")


class GFTTrainer(Trainer):
    """Group Fine-Tuning of a causal language model.

    model: a transformers model, or the name or path of one (also "smollm2", or a GGUF file), then loaded in float32.
    train_dataset, eval_dataset: lists of rows or datasets.Dataset (docs/training.md#rows).
    reward_funcs: functions, ready names or dotted paths. rollout_fn: `f(model, prompts_ids, sampling) -> token ids`,
    instead of what `args.rollout` names. peft_config: a peft.LoraConfig, under which the model is put.
    Raises: ValueError, RowError or BackendUnavailable before training for what cannot work, RewardError when a reward
    function fails.
    """

    # compute_loss divides by the whole window's count: Trainer must not divide by the accumulation steps again.
    loss_is_scaled_for_ga = True
    args: GFTConfig
    train_dataset: Rows | None
    _eval_batches = 0
    _last_log, _aside = 0.0, 0.0  # a time; seconds since then that were not training

    def __init__(
        self,
        model,
        args: GFTConfig,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        reward_funcs: Sequence[Callable | str] | Callable | str = (),
        rollout_fn: Callable | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        peft_config: Any = None,
    ):
        if not isinstance(args, GFTConfig):
            raise TypeError(
                f"args must be a GFTConfig, got {type(args).__name__}; it takes every option of TrainingArguments."
            )
        check_backend(args)
        if isinstance(model, str):
            model = pretrained.located(model)
            processing_class = processing_class or AutoTokenizer.from_pretrained(model)
            # An AdamW step of 1e-6 is less than half the last bit of most bfloat16 weights: it would be lost.
            model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        if peft_config is not None:
            model = peft_adapters.adapted(model, peft_config)
        if processing_class is None or getattr(processing_class, "eos_token_id", None) is None:
            raise ValueError("processing_class must be a tokenizer with an end-of-text token, got none; pass one.")
        refuse_virtual_tokens(model)
        rewards = Rewards(reward_funcs, args.reward_weights)
        self._rows = functools.partial(
            Rows,
            tokenizer=processing_class,
            config=args,
            limits=Limits.of(model.config),
            required_columns=sorted(rewards.required_columns()),
        )
        train_rows = self.rows_of(train_dataset, "train_dataset")
        if train_rows is not None:
            if not any(parameter.requires_grad for parameter in model.parameters()):
                raise ValueError(
                    "model must have a weight to train, got none that requires grad; unfreeze it, or merge its adapter."
                )
            check_sources(args, train_rows, rewards, args.world_size)
        self.follows = FollowsPolicy(self)
        super().__init__(
            model=model,
            args=args,
            data_collator=list,  # type: ignore[arg-type]  # rows stay rows until their groups are built
            train_dataset=train_rows,
            eval_dataset=self.rows_of(eval_dataset, "eval_dataset"),
            processing_class=processing_class,
            compute_metrics=heldout_summary(rewards.names, args.eval_temperatures),
            callbacks=[RunLog(), *([self.follows] if args.sync_ref_model else []), Manifests(), *(callbacks or [])],
            optimizers=optimizers,
        )
        windows.refuse_layouts(args, self.accelerator)
        # Read by transformers before 5.19, where loss_is_scaled_for_ga does not exist yet.
        self.model_accepts_loss_kwargs = True
        language_model = unwrapped(self.accelerator.unwrap_model(self.model))
        self.sharing = windows.Sharing(args, language_model, self.accelerator)
        self.rollout = Rollout(args, self.model, rollout_fn, processing_class, self.sharing.samples)
        self.builder = GroupBuilder(args, processing_class, rewards, self.rollout, end_tokens(model, processing_class))
        self.ask = Forward(args, language_model, self.accelerator, self.sharing.samples)
        self.start_model = start_model(model, args.device) if args.log_kl or args.beta else None
        self.means = Means(args.device)
        self._ahead: list[windows.Window] = []  # sampled and not yet trained on, of the epoch of this iterator
        self._epoch: Iterator | None = None

    def rows_of(self, records, name: str) -> Any:
        """Rows checked and tokenised as training needs them. Raises RowError, TypeError for what is no list of rows."""
        if records is None or isinstance(records, Rows):
            return records
        if isinstance(records, dict):
            return {key: self.rows_of(some, f"{name}[{key!r}]") for key, some in records.items()}
        return self._rows(records, name)

    def get_train_dataloader(self) -> DataLoader:
        """Rows in an order that gives every rank as many, the last ones absent where they do not suffice."""
        if self.train_dataset is None:
            return super().get_train_dataloader()  # which refuses
        args, order = self.args, windows.row_order(self.train_dataset, self.args)
        loader = self._loader(self.train_dataset, args.train_batch_size, (*LOADER, *OF_TRAINING), order)
        if isinstance(order, windows.EvenSampler):  # is told the epoch so, behind skipped batches too
            loader.set_sampler(order)  # type: ignore[attr-defined]
        self._steps_per_epoch = max(math.ceil(len(loader) / args.gradient_accumulation_steps), 1)
        return loader

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """The rows given, those of a name, or all that the trainer has.

        Trainer's would drop what is left of a batch where training's does, and stay with the first rows where its
        workers are persistent.
        """
        own: Any = self.eval_dataset
        rows = own[eval_dataset] if isinstance(eval_dataset, str) else own if eval_dataset is None else eval_dataset
        return super().get_eval_dataloader() if rows is None else self.get_test_dataloader(rows)  # the first refuses

    def get_test_dataloader(self, test_dataset) -> DataLoader:
        return self._loader(test_dataset, self.args.eval_batch_size, LOADER)

    def _loader(self, rows: Rows, batch: int, options: Sequence[str], order: Sampler | None = None) -> DataLoader:
        given: Any = {name: getattr(self.args, f"dataloader_{name}") for name in options}
        return self.accelerator.prepare(DataLoader(rows, batch, sampler=order, collate_fn=list, **given))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.args.sync_ref_model:
            self.follows.restore(resume_from_checkpoint)

    def train(self, *args, **kwargs):
        self.means = Means(self.args.device)  # what an earlier run has not logged is not of this one
        self._last_log, self._aside = time.perf_counter(), 0.0
        try:
            return super().train(*args, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, SaveOnInterrupt):
                    callback.restore()

    # One optimizer step

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The next window's micro-batches as tensors, and the denominator of its loss over all ranks."""
        if 0 < self.state.max_steps <= self.state.global_step:  # resumed at its end: Trainer would take one more step
            self.control.should_training_stop = True
            return [], None
        if self._epoch is not epoch_iterator or not self._ahead:  # those of an epoch that was broken off are forgotten
            self._epoch, self._ahead = epoch_iterator, self._roll_out(epoch_iterator, num_batches, device)
        window = self._ahead.pop(0)
        self.means.add_groups(window.groups, self.args)
        every, step = self.args.log_completions_steps, self.state.global_step
        if every and step % every == 0 and window.groups and self.is_world_process_zero():
            show_completions(window.groups, step, str(self.args.output_dir), self.callback_handler.callbacks)
        num_items = torch.tensor(denominator(window.groups, self.args), dtype=torch.float32, device=device)
        return window.micro_batches, self.accelerator.gather(num_items).sum().clamp(min=1)

    def _roll_out(self, epoch_iterator, num_batches, device) -> list[windows.Window]:
        """The next windows, sampled with the weights as they are, and what those say of every response."""
        begun, spent, args = time.perf_counter(), self.rollout.spent, self.args
        steps, times = windows.next_rollout(self.state.global_step, self._steps_per_epoch, args)
        steps = max(min(steps, self.state.max_steps - self.state.global_step), 1)
        draw = super().get_batch_samples
        steps_batches = [draw(epoch_iterator, num_batches, device)[0] for _ in range(steps * times)][:steps]
        rows = [row for batches in steps_batches for batch in batches for row in batch]
        groups = self.builder.build(self.model, rows, (args.seed, TRAINING, self.state.global_step, args.process_index))
        parts = iter(windows.micro_batches_of(groups, [*itertools.chain(*steps_batches)], args.rollout_order))
        steps_parts = [[next(parts) for _ in some] for some in steps_batches if some]
        how = (self.builder.pad_id, args.mask_truncated_completions, self.sharing.applies)
        cut = [windows.window_of(some, *how) for some in steps_parts]
        for window in cut:
            self.ask.remember(window, self.model, self.start_model)
        tokens, seconds = (now - before for now, before in zip(self.rollout.spent, spent, strict=True))
        self.means.add("tokens_per_second/sampling", tokens, seconds)
        self._aside += time.perf_counter() - begun
        return cut * times or [windows.Window([], [])]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The micro-batch's share of the step's loss. `model` is the wrapped one: its hooks average gradients."""
        outputs, targets_ST = self.ask.step(model, inputs, num_items_in_batch)
        if self.args.token_metrics:
            if "ref_log_probs" not in inputs and self.start_model is not None and self._logs_after_this_step():
                inputs = {**inputs, "ref_log_probs": self.ask.log_probs(self.start_model, inputs)}
            self.means.add_step(outputs.stats, targets_ST != IGNORE, inputs, clip_range(self.args))
        # Data parallelism averages gradients over the ranks, but the denominator is already the sum over ranks.
        loss = outputs.loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    # Evaluation

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        """Metrics of rows, of those given to the trainer, or of one of these by its name."""
        begun, aside = time.perf_counter(), self._aside
        if not isinstance(eval_dataset, str):
            eval_dataset = self.rows_of(eval_dataset, "eval_dataset")
        with self._same_random_numbers():
            metrics = super().evaluate(eval_dataset, *args, **kwargs)
        self._aside = aside + time.perf_counter() - begun
        return metrics

    def predict(self, test_dataset, *args, **kwargs):
        """The same of other rows; `predictions` has the line of each row (docs/training.md#evaluation)."""
        with self._same_random_numbers():
            return super().predict(self.rows_of(test_dataset, "test_dataset"), *args, **kwargs)

    def _same_random_numbers(self) -> contextlib.AbstractContextManager:
        """In every evaluation, and training's go on behind it as if there had been none."""
        self._eval_batches = 0
        return seeded(self.args.seed, EVALUATION, device=self.args.device)  # a loader draws on the global stream

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """One line per row of the list `inputs`, in the order that heldout_summary reads.

        The loss is left to the summary over the whole set: a mean of batch means would depend on the batch size.
        """
        args, builder = self.args, self.builder
        entropy = (args.seed, EVALUATION, self._eval_batches, args.process_index)
        self._eval_batches += 1
        columns = [self.ask.experts(model, inputs, builder.pad_id)]
        for temperature in args.eval_temperatures:
            sampled = builder.sample(self.model, inputs, args.eval_num_generations, temperature, entropy)
            lines = heldout_lines(inputs, sampled, builder.rewards)
            columns.append(torch.tensor(lines, device=args.device))
        lines_BX = torch.cat(columns, 1)
        return None, lines_BX, torch.zeros(len(inputs), device=args.device)

    # Reporting

    def _logs_after_this_step(self) -> bool:
        step, by_epoch = self.state.global_step + 1, self.args.logging_strategy == "epoch"
        every = self._steps_per_epoch if by_epoch else max(int(self.state.logging_steps or 1), 1)
        first = step == 1 and self.args.logging_first_step
        return first or step % every == 0 or (by_epoch and step == self.state.max_steps)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last training log line, and warns once of each sign of a collapse."""
        if "loss" in logs:
            now = time.perf_counter()
            logs = {**logs, **self.means.drain(self.accelerator, now - self._last_log, self._aside)}
            flags, sentences = signs_of_collapse(self.state.log_history, logs)
            logs |= flags
            for sentence in sentences if self.is_world_process_zero() else ():
                warnings.warn(sentence, stacklevel=2)
            self._last_log, self._aside = now, 0.0
        super().log(logs, start_time)
