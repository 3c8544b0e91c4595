"""What each optimizer step trains on: whole groups, as many micro-batches on every rank, one rollout for several steps.

A window is the micro-batches of one step's gradient accumulation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.utils.data import Dataset, RandomSampler, Sampler, SequentialSampler

from gft_kernels.data.rows import Response
from gft_kernels.trainer.config import GFTConfig
from gft_kernels.trainer.groups import IGNORE, Group, collate


@dataclass
class Window:
    """The groups of one optimizer step, those without responses left out, and its micro-batches as tensors."""

    groups: list[Group]
    micro_batches: list[dict[str, Tensor]]


def window_of(
    groups: Iterator[Group],
    batches: Sequence[Sequence],
    pad_id: int,
    left_out: Callable[[Response], bool] | None = None,
) -> Window:
    """The window of `batches` of rows, whose groups come next; responses `left_out` keep no target, so no loss."""
    parts = [[next(groups) for _ in batch] for batch in batches]
    micro_batches = [collate(part, pad_id) for part in parts]
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
