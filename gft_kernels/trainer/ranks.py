"""Several ranks: whole groups on each, as many micro-batches on all, and what a sharded model asks of sampling."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.utils.data import RandomSampler, Sampler

from gft_kernels.trainer.config import GFTConfig


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


def even_sampler(rows: Sampler, args: GFTConfig) -> Sampler:
    """`rows` for a single rank; for several, in an order they agree on, and a whole micro-batch for each of them."""
    if args.world_size == 1 or args.dataloader_drop_last:
        return rows
    if isinstance(rows, RandomSampler):
        from accelerate.data_loader import SeedableRandomSampler

        seed = args.seed if args.data_seed is None else args.data_seed
        rows = SeedableRandomSampler(rows.data_source, data_seed=seed)
    return EvenSampler(rows, args.world_size * args.train_batch_size)


def forward_is_collective(model: nn.Module) -> bool:
    """Whether a forward of this model needs every rank, for its weights lie in parts on all of them.

    Then all ranks must sample as often and as long as any of them.
    """
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule) or any(hasattr(p, "ds_id") for p in model.parameters())  # ds_id: ZeRO-3


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
