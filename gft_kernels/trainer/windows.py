"""What each optimizer step trains on: whole groups, as many micro-batches on every rank, one rollout for several steps.

A window is the micro-batches of one step's gradient accumulation.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, RandomSampler, Sampler, SequentialSampler

from gft_kernels.data.rows import Response, Row
from gft_kernels.model.shared_prompts import ARGUMENTS, PROMPT_IDS
from gft_kernels.trainer.config import GFTConfig
from gft_kernels.trainer.groups import IGNORE, Group, collate

TEXTS = ("input_ids", "attention_mask")


@dataclass
class Window:
    """The groups of one optimizer step, those without responses left out, and its micro-batches as tensors."""

    groups: list[Group]
    micro_batches: list[dict[str, Tensor]]


def micro_batches_of(groups: Sequence[Group], batches: Sequence[Sequence], order: str) -> list[list[Group]]:
    """The groups of a rollout over the `batches` of its rows: whole, or in the order of the paper's code.

    That is all samples first, then all the rows brought, in as many equal parts: groups are split, weighed as a whole.
    """
    if order == "groups":
        whole = iter(groups)
        return [[next(whole) for _ in batch] for batch in batches]
    pairs = [(g.row, r) for g in groups for r in g.responses]
    pairs.sort(key=lambda pair: pair[1].source != "sampled")
    ends = [len(pairs) * i // len(batches) for i in range(len(batches) + 1)]
    return [
        [Group(some[0][0], [r for _, r in some]) for some in same_row(pairs[start:end])]
        for start, end in itertools.pairwise(ends)
    ]


def same_row(pairs: Sequence[tuple[Row, Response]]) -> list[list[tuple[Row, Response]]]:
    return [list(some) for _, some in itertools.groupby(pairs, key=lambda pair: id(pair[0]))]


def window_of(
    parts: Sequence[Sequence[Group]],
    pad_id: int,
    left_out: Callable[[Response], bool] | None,
    shares: Callable[[Sequence[Group]], bool],
) -> Window:
    """The window of these micro-batches; responses `left_out` keep no target there, so no loss.

    A micro-batch that `shares` holds each prompt once.
    """
    micro_batches = [collate(part, pad_id, shares(part)) for part in parts]
    for part, inputs in zip(parts, micro_batches, strict=True):
        for s, response in enumerate(r for g in part for r in g.responses):
            if left_out is not None and left_out(response):
                inputs["targets"][s] = IGNORE
    return Window([g for part in parts for g in part if g.responses], micro_batches)


class Queue:
    """Windows that are sampled and not yet trained on; those of an epoch that was broken off are forgotten."""

    def __init__(self):
        self.windows: list[Window] = []
        self.source: Iterator | None = None

    def is_empty(self, source: Iterator) -> bool:
        if self.source is not source:
            self.windows, self.source = [], source
        return not self.windows


class Forward:
    """A patched model asked about micro-batches: for the loss of a step, or the log pi of their targets."""

    def __init__(self, model: nn.Module, accelerator):
        # Where the loss needs logits after all, a model that can will not compute those of the prompts.
        self.keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.accelerator = accelerator

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

    @torch.no_grad()
    def log_probs(self, model: Any, inputs, **options) -> Tensor:
        """log pi (nats) of each target as the policy samples, without dropout."""
        training = model.training
        model.eval()
        with self.accelerator.autocast():
            inputs = send_to_device(inputs, self.accelerator.device)
            outputs, _ = self(model, inputs, gft_return_stats=True, **options)
        model.train(training)
        return outputs.stats.log_probs

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


def start_model(model: nn.Module, device: torch.device) -> nn.Module:
    """A frozen copy of a patched model as it is now, whole on this rank. Raises ValueError where it is not whole."""
    if any(p.numel() == 0 for p in model.parameters()):
        raise ValueError(
            "zero3_init_flag must be false with log_kl or beta, got a model whose weights are elsewhere; "
            "every rank keeps a whole copy of the starting weights."
        )
    return copy.deepcopy(model).requires_grad_(False).eval().to(device)


class EvenSampler(Sampler):
    """The rows of another sampler, then None until every rank has as many.

    accelerate would start again with the first rows instead, which would train twice in an epoch. A None becomes a
    place without a row (data.Rows), which counts for nothing.
    """

    def __init__(self, rows: Sampler, multiple: int):
        self.rows, self.multiple = rows, multiple

    def __len__(self) -> int:
        return -(-len(self.rows) // self.multiple) * self.multiple  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int | None]:
        yield from self.rows
        yield from [None] * (len(self) - len(self.rows))  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)


def row_order(rows: Dataset, args: GFTConfig) -> Sampler:
    """The order of an epoch; for several ranks one they agree on, with a whole micro-batch for each of them."""
    random = args.train_sampling_strategy == "random"
    order = RandomSampler(rows) if random else SequentialSampler(rows)  # type: ignore[arg-type]
    if args.world_size == 1 or args.dataloader_drop_last:
        return order
    if random:
        from accelerate.data_loader import SeedableRandomSampler

        order = SeedableRandomSampler(rows, data_seed=args.seed if args.data_seed is None else args.data_seed)
    return EvenSampler(order, args.world_size * args.train_batch_size)


def refuse_layouts(args: GFTConfig, accelerator) -> None:
    """Raises ValueError for a way of running in parallel in which a step would be wrong or hang."""
    if args.n_gpu > 1:
        raise ValueError(
            f"the trainer must run one process per GPU, got {args.n_gpu} in one process; start it by torchrun."
        )
    if getattr(accelerator, "parallelism_config", None) is not None:
        raise ValueError("parallelism_config must be absent, got one; only data parallelism is supported.")
    if str(accelerator.distributed_type).endswith("FSDP") and not accelerator.is_fsdp2:
        raise ValueError("fsdp_version must be 2, got 1; its flat parameters cannot be sampled from.")
    for name in ("dispatch_batches", "split_batches"):
        if getattr(args.accelerator_config, name):
            raise ValueError(f"accelerator_config.{name} must be False, got True; every rank reads its own rows.")
