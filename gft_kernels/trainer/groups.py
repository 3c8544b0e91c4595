"""Hybrid groups: given responses and samples of the policy, rewarded, weighted against each other, made tensors.

Sizes: S responses of a micro-batch, L tokens of the longest prompt and response, T positions the loss reads, R tokens
of the longest response.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gft_kernels.advantages import group_advantages, over_batch_spread
from gft_kernels.data.rows import Response, Row, Rows
from gft_kernels.data.text import decode
from gft_kernels.model.columns import IGNORE
from gft_kernels.model.shared_prompts import layout
from gft_kernels.objectives import PRESETS
from gft_kernels.options import BATCH, SPLIT
from gft_kernels.trainer.config import GFTConfig
from gft_kernels.trainer.rewards import RewardError, Rewards
from gft_kernels.trainer.rollouts import Sampling, forward_is_collective, is_complete, seeded

SOURCES = ("expert", "teacher", "sampled", "offline")


@dataclass
class Group:
    """All responses to one prompt that are weighed against each other."""

    row: Row
    responses: list[Response]
    resampled: bool = False  # because the rewards of its first samples were equal
    left_out: bool = False  # of the step, because they still are
    whole: list[Response] | None = None  # where this is a part of a group: the responses of all of it

    @property
    def is_silent(self) -> bool:
        """Whether no response is weighed against another: the rewards are equal."""
        return all(response.advantage == 0 for response in self.whole or self.responses)

    @property
    def share(self) -> float:
        """Of its group: 1, but for a part of one."""
        return len(self.responses) / len(self.whole or self.responses)


class GroupBuilder:
    """Turns the rows of one optimizer step into groups with advantages (F5)."""

    def __init__(self, config: GFTConfig, tokenizer, rewards: Rewards, rollout_fn: Callable, eos_ids: tuple[int, ...]):
        self.config, self.tokenizer, self.rewards, self.rollout_fn = config, tokenizer, rewards, rollout_fn
        self.eos_ids = eos_ids
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def build(self, model, rows: Sequence[Row], entropy: Sequence[int]) -> list[Group]:
        """Groups of the rows, in order, without responses where a row is absent; `entropy` decides the samples."""
        config, groups = self.config, [Group(row, []) for row in rows]
        self._fill(model, groups, entropy, groups)
        if config.advantages != "group":
            return groups
        weigh(groups, config)
        for again in range(1, 1 + config.max_resamples if config.dynamic_sampling == "resample" else 1):
            silent = [group for group in groups if group.is_silent and not group.row.absent]
            if not any(gather_object([bool(silent)])):  # all ranks sample equally often
                break
            self._fill(model, groups, (*entropy, again), silent)
            weigh(groups, config)
            for group in silent:
                group.resampled = True
        for group in groups if config.dynamic_sampling else ():
            group.left_out = group.is_silent
        return groups

    def _fill(self, model, groups: Sequence[Group], entropy: Sequence[int], chosen: Sequence[Group]) -> None:
        """Sample and reward the responses of those groups that are chosen."""
        config, places = self.config, set(map(id, chosen))
        rows = [g.row if id(g) in places else replace(g.row, absent=True) for g in groups]
        sampled = self.sample(model, rows, config.num_generations, config.temperature, entropy)
        for group, row, samples in zip(groups, rows, sampled, strict=True):
            if not row.absent:
                group.responses = [*row.given, *samples]
        if config.advantages == "group":
            self._reward(chosen)
        for group in chosen if config.curriculum else ():
            group.responses = untaught(group.responses)

    def sample(self, model, rows, number, temperature, entropy) -> list[list[Response]]:
        """`number` responses of the policy per row, none where a row is absent.

        All rows of a step are sampled in the same calls however they are cut into micro-batches, so that the
        accumulation does not change what is sampled.
        """
        # Where weights lie in parts on all ranks, one without a row must call as often as the others.
        asks = [number > 0 and (not row.absent or forward_is_collective(model)) for row in rows]
        asked = [row.prompt_ids for row, asks_too in zip(rows, asks, strict=True) if asks_too]
        size = self.config.generation_batch_size or max(len(asked), 1)
        sampling = Sampling(number, self.config.max_completion_length, temperature, self.eos_ids, self.pad_id)
        completions = []
        with seeded(*entropy, device=model.device):
            for start in range(0, len(asked), size):
                completions += self.rollout_fn(model, asked[start : start + size], sampling)
        responses = map(self._response, completions)
        drawn = [list(itertools.islice(responses, number)) if asks_too else [] for asks_too in asks]
        return [[] if row.absent else samples for row, samples in zip(rows, drawn, strict=True)]

    def _response(self, ids: list[int]) -> Response:
        text = decode(self.tokenizer, ids, self.eos_ids, self.config.skip_special_tokens)
        whole = is_complete(ids, self.eos_ids, self.config.stop_strings, self.tokenizer)
        return Response(text, ids, "sampled", truncated=not whole)

    def _reward(self, groups):
        pairs = [(g.row, r) for g in groups for r in g.responses if r.source != "offline"]
        if pairs:
            totals, _ = self.rewards.score([row for row, _ in pairs], [response.text for _, response in pairs])
            for (_, response), total in zip(pairs, totals, strict=True):
                response.reward = total


def untaught(responses: list[Response]) -> list[Response]:
    """The responses with the first of the demonstrations alone: the share, rounded up, that the samples do not solve.

    Raises: RewardError for a mean reward of the samples outside [0, 1], which is no solve rate.
    """
    samples = [r for r in responses if r.source == "sampled"]
    given = [r for r in responses if r.source != "sampled"]
    solved = sum(r.reward for r in samples) / max(len(samples), 1)
    if not 0 <= solved <= 1:
        raise RewardError(f"reward_funcs must return numbers in [0, 1] with curriculum, got a mean of {solved:g}.")
    return given[: math.ceil(len(given) * (1 - solved) - 1e-9)] + samples  # 4·(1 - 2/3) is a hair above its third


def weigh(groups: Sequence[Group], config: GFTConfig) -> None:
    """F5 within each group."""
    responses = [r for g in groups for r in g.responses]
    split: dict[str, Any] = {}
    if config.normalize == SPLIT:
        given_S = torch.tensor([r.source != "sampled" for r in responses], dtype=torch.bool)
        split = {"given": given_S, "imitation": config.imitation}
    advantages_S = group_advantages(
        torch.tensor([r.reward for r in responses], dtype=torch.float64),
        group_ids=torch.tensor([i for i, g in enumerate(groups) for _ in g.responses], dtype=torch.int64),
        normalize="mean" if config.normalize == BATCH else str(config.normalize),
        eps=config.advantage_eps,
        singleton=config.singleton,
        **split,
    )
    if config.normalize == BATCH:
        every = torch.tensor(gather_object([r.reward for r in responses]), dtype=torch.float64)
        advantages_S = over_batch_spread(advantages_S, every, config.advantage_eps)
    for response, advantage in zip(responses, advantages_S.tolist(), strict=True):
        response.advantage = advantage


def collate(groups: Sequence[Group], pad_id: int, shares: bool = False) -> dict[str, Tensor]:
    """Tensors of one micro-batch of groups, right-padded, so that positions count from 0 in every row.

    input_ids, attention_mask (S, L); targets (S, T), aligned with the last T + 1 logits but the very last: position
    t predicts targets[:, t], IGNORE on prompt and padding; advantages (S,) float32; sources (S,) index SOURCES.
    With `shares`, each prompt once: the tensors of shared_prompts.layout, and targets (S, R) of the responses alone.
    Groups without responses give one row without a target: its loss is 0, and every rank has a forward to take.
    Raises: ValueError for a prompt of no tokens.
    """
    pairs = [(g.row.prompt_ids, r) for g in groups for r in g.responses]
    if not pairs:
        nothing = Group(Row("", [pad_id], []), [Response("", [pad_id], SOURCES[0], advantage=0.0)])
        found = collate([nothing], pad_id)
        return {**found, "targets": torch.full_like(found["targets"], IGNORE)}
    if not all(prompt for prompt, _ in pairs):
        raise ValueError("every prompt must have at least one token, got one of none; nothing predicts its response.")
    if shares:
        texts, targets_ST = layout([(g.row.prompt_ids, [r.ids for r in g.responses]) for g in groups], pad_id)
    else:
        texts, targets_ST = whole_rows([(prompt, r.ids) for prompt, r in pairs], pad_id)
    return {
        **texts,
        "targets": targets_ST,
        "advantages": torch.tensor([r.advantage for _, r in pairs], dtype=torch.float32),
        "sources": torch.tensor([SOURCES.index(r.source) for _, r in pairs]),
    }


def whole_rows(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int) -> tuple[dict[str, Tensor], Tensor]:
    """Prompts with their responses as (input_ids and attention_mask (S, L), targets (S, T))."""
    # The first position any row's loss reads is its last prompt token's.
    first = min(len(prompt) for prompt, _ in pairs) - 1
    texts = [torch.tensor([*prompt, *ids]) for prompt, ids in pairs]
    behind = [torch.tensor([IGNORE] * (len(prompt) - 1 - first) + [*ids]) for prompt, ids in pairs]
    mask = pad_sequence([torch.ones_like(text) for text in texts], True)
    return {"input_ids": pad_sequence(texts, True, pad_id), "attention_mask": mask}, pad_sequence(behind, True, IGNORE)


def count_items(groups: Sequence[Group], reduction: str) -> int:
    """The denominator of a step: all response tokens, or all responses. Groups without advantage count if they stay."""
    responses = [r for g in groups if not g.left_out for r in g.responses]
    return sum(len(r.ids) for r in responses) if reduction == "token-mean" else len(responses)


def denominator(groups: Sequence[Group], config: GFTConfig) -> int:
    """What a step's loss is divided by: its response tokens or responses.

    Dr. GRPO's is a constant, the longest response allowed times the number of responses.
    """
    if PRESETS[config.objective].constant_denominator:
        return count_items(groups, "sequence-mean") * config.max_completion_length
    return count_items(groups, str(config.reduction))


def check_sources(args: GFTConfig, rows: Rows, rewards: Rewards, ranks: int) -> None:
    """Raises ValueError if rows, reward functions and the make-up of groups and batches contradict each other."""
    prompts = args.per_device_train_batch_size * ranks
    if args.dataloader_drop_last and len(rows) < prompts:
        raise ValueError(
            f"dataloader_drop_last must be False with {len(rows)} rows, fewer than the {prompts} prompts of a "
            f"micro-batch over {ranks} ranks, got True; nothing would be left to train on."
        )
    if rows.offline:
        if args.num_generations:
            raise ValueError(
                f"num_generations must be 0 where rows bring `responses` and `rewards`, got {args.num_generations}; "
                "nothing says that samples would be rewarded alike."
            )
        if args.normalize == SPLIT:
            raise ValueError(
                "normalize must not be 'split' where rows bring `responses`, got 'split'; "
                "nothing says which of them the policy sampled."
            )
        return
    if args.num_demonstrations + args.num_generations == 0:
        raise ValueError("num_demonstrations + num_generations must be at least 1, got 0; a group would be empty.")
    if args.advantages == "group" and not rewards:
        raise ValueError(
            "reward_funcs (a configuration's `rewards`) must hold at least one function, got none; "
            "or set advantages to 'ones' for SFT."
        )
