"""What each optimizer step trains on: whole groups, as many micro-batches on every rank, one rollout for several steps.

A window is the micro-batches of one step's gradient accumulation.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, RandomSampler, Sampler, SequentialSampler

from gft_kernels.data.rows import Response
from gft_kernels.model import shared_prompts
from gft_kernels.model.columns import IGNORE
from gft_kernels.trainer.config import GFTConfig
from gft_kernels.trainer.groups import Group, collate

logger = logging.getLogger(__name__)
WORTHWHILE = 0.9  # of the tokens of whole rows; a second pass through the layers costs what some tokens do


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
    pairs = [(g, r) for g in groups for r in g.responses]
    pairs.sort(key=lambda pair: pair[1].source != "sampled")
    ends = [len(pairs) * i // len(batches) for i in range(len(batches) + 1)]
    return [parts_of(pairs[start:end]) for start, end in itertools.pairwise(ends)]


def parts_of(pairs: Sequence[tuple[Group, Response]]) -> list[Group]:
    """Each group with those of its responses that are here."""
    found = [list(some) for _, some in itertools.groupby(pairs, key=lambda pair: id(pair[0]))]
    return [replace(some[0][0], responses=[r for _, r in some], whole=some[0][0].responses) for some in found]


def window_of(
    parts: Sequence[Sequence[Group]],
    pad_id: int,
    masks_truncated: bool,
    shares: Callable[[Sequence[Group]], bool],
) -> Window:
    """The window of these micro-batches without the groups that are left out.

    With `masks_truncated` truncated responses keep no target there, so no loss. A micro-batch that `shares` holds each
    prompt once.
    """
    kept = [[group for group in part if not group.left_out] for part in parts]
    micro_batches = [collate(part, pad_id, shares(part)) for part in kept]
    for part, inputs in zip(kept, micro_batches, strict=True):
        for s, response in enumerate(r for g in part for r in g.responses):
            if masks_truncated and response.truncated:
                inputs["targets"][s] = IGNORE
    return Window([g for part in parts for g in part if g.responses], micro_batches)


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
    kind = accelerator.distributed_type
    if kind in ("FSDP", "DEEPSPEED"):
        return f"{kind.value} gathers weights, or reduces gradients, once for each call of a layer"
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


class EvenSampler(Sampler):
    """The rows of another sampler, then None until every rank has as many.

    accelerate would start again with the first rows instead, which would train twice in an epoch. A None becomes a
    place without a row (data.Rows), which counts for nothing. Every `block` multiples of rows come `times` over.
    """

    def __init__(self, rows: Sampler, multiple: int, block: int = 1, times: int = 1):
        self.rows, self.multiple, self.block, self.times = rows, multiple, block, times

    def __len__(self) -> int:
        return -(-len(self.rows) // self.multiple) * self.multiple * self.times  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int | None]:
        rows = iter(self.rows)
        while block := list(itertools.islice(rows, self.multiple * self.block)):
            block += [None] * (-len(block) % self.multiple)
            yield from block * self.times

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)


def row_order(rows: Dataset, args: GFTConfig) -> Sampler:
    """The order of an epoch; for several ranks one they agree on, with a whole micro-batch for each of them.

    With `num_iterations` a rollout's rows, in whole steps, stand there as often as it is trained on.
    """
    random = args.train_sampling_strategy == "random"
    order = RandomSampler(rows) if random else SequentialSampler(rows)  # type: ignore[arg-type]
    if (args.world_size == 1 or args.dataloader_drop_last) and args.num_iterations == 1:
        return order
    if random:
        from accelerate.data_loader import SeedableRandomSampler

        order = SeedableRandomSampler(rows, data_seed=args.seed if args.data_seed is None else args.data_seed)
    multiple = args.world_size * args.train_batch_size
    if args.num_iterations == 1:
        return EvenSampler(order, multiple)
    return EvenSampler(order, multiple * args.gradient_accumulation_steps, args.steps_per_rollout, args.num_iterations)


def next_rollout(step: int, steps_per_epoch: int, args: GFTConfig) -> tuple[int, int]:
    """(steps sampled for at once, times they are trained on) from optimizer step `step` of the run on.

    A run resumed in the middle of a rollout samples what is left of its pass, and each further pass, anew.
    """
    step %= steps_per_epoch
    size, times = args.steps_per_rollout * args.num_iterations, args.num_iterations
    begun = step // size * size
    steps = min(args.steps_per_rollout, (steps_per_epoch - begun) // times)  # the last of an epoch has fewer
    passes, within = divmod(step - begun, steps)
    return steps - within, 1 if within else times - passes


def refuse_layouts(args: GFTConfig, accelerator) -> None:
    """Raises ValueError for a way of running in parallel in which a step would be wrong or hang."""
    if args.n_gpu > 1:
        raise ValueError(
            f"the trainer must run one process per GPU, got {args.n_gpu} in one process; start it by torchrun."
        )
    if getattr(accelerator, "parallelism_config", None) is not None:
        raise ValueError("parallelism_config must be absent, got one; only data parallelism is supported.")
    if accelerator.distributed_type == "FSDP" and not accelerator.is_fsdp2:
        raise ValueError("fsdp_version must be 2, got 1; its flat parameters cannot be sampled from.")
    if args.sync_ref_model and accelerator.distributed_type == "DEEPSPEED":
        raise ValueError("sync_ref_model must be False with DeepSpeed, got True; the copy could not follow the policy.")
    for name, needed in (("dispatch_batches", False), ("split_batches", False), ("even_batches", True)):
        if bool(getattr(args.accelerator_config, name)) is not needed:
            raise ValueError(
                f"accelerator_config.{name} must be {needed}, got {not needed}; "
                "every rank reads its own rows, in as many batches."
            )
