"""`gft train --dry-run`: settings, data columns, batches and memory of a run, without its GPU and its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from gft_kernels.cli import forecast
from gft_kernels.cli.activations import activation_memory
from gft_kernels.cli.inputs import configuration, held_out_rows, rows, spread
from gft_kernels.cli.settings import RunSettings
from gft_kernels.data import pretrained
from gft_kernels.data.rows import Limits, Rows
from gft_kernels.trainer import GFTConfig, peft_adapters
from gft_kernels.trainer.config import described
from gft_kernels.trainer.groups import check_sources
from gft_kernels.trainer.rewards import Rewards, find

GIB = 1 << 30
REWARDED = 64  # rows whose demonstrations are rewarded


def dry_run(settings: RunSettings, options: dict[str, Any], ranks: int) -> str:
    """The report. Raises ValueError, TypeError, OSError, RewardError for what training would refuse."""
    on_cpu = {} if torch.cuda.is_available() else {"use_cpu": True}
    config = configuration({**options, **on_cpu})
    lora = None if settings.peft is None else peft_adapters.lora_config(settings.peft)
    if settings.rollout_fn:
        find(settings.rollout_fn, "rollout_fn")
    model = pretrained.located(settings.model)
    tokenizer = local(AutoTokenizer, pretrained.located(settings.tokenizer) if settings.tokenizer else model)
    own_config = local(AutoConfig, model)
    model_config = own_config or given_config(settings)
    kept, longest, about_rows = checked_rows(settings, config, tokenizer, Limits.of(model_config), ranks)
    lines = [f"settings     {described(config)}; rollout {config.rollout}, backend {config.backend}", *about_rows]
    records = [kept.records[i] for i in kept.kept]
    offline = kept.offline
    group = max(len(r["responses"]) for r in records) if offline else config.num_demonstrations + config.num_generations
    found = forecast.batches(config, len(records), ranks, group)
    lines += batch_lines(config, found)
    if model_config is None:
        lines.append(
            f"memory       {settings.model} is not on disk and model_config is not given: no estimate; "
            "set model_config to its config.json"
        )
        return "\n".join(lines)
    if own_config is None:
        lines.append(f"model        {settings.model} is not on disk: its numbers are those of {settings.model_config}")
    shape = forecast.shape_of(model_config, lora)
    activations = activation_memory(config, model_config, shape, found, longest)
    return "\n".join(lines + memory_lines(config, shape, found, longest, activations))


def checked_rows(
    settings: RunSettings, config: GFTConfig, tokenizer: Any, limits: Limits, ranks: int
) -> tuple[Rows, int, list]:
    """The rows to train on, the tokens of their longest prompt, and lines about them and those held out."""
    records, (eval_records, there) = rows(settings.data, settings.reader, "train"), held_out_rows(settings)
    rewards = Rewards(settings.rewards or (), config.reward_weights)
    of_all = tokenizer or Unread(), config, limits, sorted(rewards.required_columns())
    kept = Rows(records, "train_dataset", *of_all)
    check_sources(config, kept, rewards, ranks)
    found = (kept[i] for i in range(len(kept)))
    sizes = [(len(row.prompt_ids), max((len(given.ids) for given in row.given), default=0)) for row in found]
    longest, given = map(max, zip(*sizes, strict=True))
    lengths = f"longest prompt {longest} tokens, response {given} of {config.max_completion_length} allowed"
    if tokenizer is None:
        lengths = "lengths not checked: the tokenizer is not on disk"
    lines = [f"data         {len(kept)} of {len(records)} rows, columns checked; {lengths}"]
    if tokenizer is not None and rewards and config.advantages == "group" and not kept.offline:
        lines += reward_lines(kept, rewards)
    if eval_records is not None:
        held_out = Rows(eval_records, "eval_dataset", *of_all)
        lines.append(f"held out     {len(held_out)} of {there} rows, columns checked")
    return kept, longest, lines


def reward_lines(kept: Rows, rewards: Rewards) -> list[str]:
    """What the rewards give to demonstrations: one that is 0 for every expert is wrong. Raises RewardError."""
    some = [kept[i] for i in spread(range(len(kept)), REWARDED)]
    pairs = [(row, given) for row in some for given in row.given]
    totals, _ = rewards.score([row for row, _ in pairs], [given.text for _, given in pairs])
    found: dict[str, list[float]] = {}
    for (_, given), total in zip(pairs, totals, strict=True):
        found.setdefault(given.source, []).append(total)
    means = ", ".join(f"{source} {sum(values) / len(values):.3g}" for source, values in found.items())
    return [f"rewards      {means} on average, of demonstrations of {len(some)} rows"] if pairs else []


class Unread:
    """Stands in for a tokenizer that is not on this disk: every text has one token, so no length is checked."""

    eos_token_id, bos_token_id, chat_template = 1, None, "any"

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [0]}

    def decode(self, ids: list[int], **options: Any) -> str:
        return "-"

    def apply_chat_template(self, messages: list[dict], **options: Any) -> str:
        return ""


def local(loader: Any, path: str) -> Any:
    """What the loader finds on this disk, or None: a dry run downloads nothing."""
    try:
        return loader.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError):
        return None


def given_config(settings: RunSettings) -> Any:
    if settings.model_config is None:
        return None
    if not Path(settings.model_config).is_file():
        raise ValueError(f"model_config must be a config.json, got {settings.model_config!r}; there is no such file.")
    return AutoConfig.from_pretrained(settings.model_config)


def batch_lines(config: GFTConfig, found: forecast.Batches) -> list[str]:
    per = f"{config.per_device_train_batch_size} prompts × {config.gradient_accumulation_steps} micro-batches"
    times = f", each taken {config.num_iterations} times" if config.num_iterations > 1 else ""
    return [
        f"group        {found.group} responses a prompt, {config.num_generations} of them sampled",
        f"step         {found.ranks} ranks × {per} = {found.prompts_per_step} prompts, "
        f"{found.prompts_per_step * found.group} responses",
        f"rollout      {config.steps_per_rollout} steps{times} = {found.prompts_per_rollout} prompts, "
        f"{found.prompts_per_rollout * config.num_generations} responses sampled; "
        f"{found.rollouts_per_rank} prompts a rank",
        f"run          {found.steps_per_epoch} steps an epoch, {found.steps} steps in all",
    ]


def memory_lines(
    config: GFTConfig, model: forecast.Shape, found: forecast.Batches, longest: int, activations: float | None
) -> list[str]:
    """Estimates in GiB for each rank; docs/training.md has the formulas."""
    other = forecast.other_memory(config, model, found, longest)
    if activations is not None:
        other = {"activations at most: responses of full length, no prompt shared": activations, **other}
    without = ", without activations" if activations is None else ""
    trained = "" if model.trained == model.parameters else f", {model.trained / 1e6:.1f} M of them trained"
    lines = [f"memory       {model.parameters / 1e9:.2f} G parameters{trained}; GiB a rank{without}:"]
    weights = forecast.weights_memory(config, model, found.ranks)
    for layout, parts in weights.items():
        each = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
        lines.append(f"  {layout:7} {sum(parts.values()) / GIB:8.2f}  {each}")
    lines += [f"  and     {size / GIB:8.2f}  {name}" for name, size in other.items()]
    if activations is not None:
        total = sum(weights["DDP"].values()) + sum(other.values())
        lines.append(f"  in all  {total / GIB:8.2f}  as DDP or one process, beside Python and its libraries")
    full = forecast.full_logits_memory(config, model, found)
    lines.append(f"  instead {full / GIB:8.2f}  of the fused loss, if the responses' logits and gradient were whole")
    return lines
