"""Which loss a step takes: the options of `policy_loss` that a GFTConfig sets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gft_kernels import objectives
from gft_kernels.objectives import PRESETS
from gft_kernels.options import Objective

if TYPE_CHECKING:
    from gft_kernels.trainer.config import GFTConfig

OBJECTIVES = tuple(PRESETS)
CHOSEN = ("tau", "rectify", "clip_low", "clip_high")  # options that only some objectives take
CLIP = 0.2  # PPO's range, in which to count the ratios of an objective that does not clip


def settle(config: GFTConfig) -> None:
    """Fill in the objective's defaults. Raises ValueError, naming it, for an option the objective does not use."""
    preset = PRESETS[config.objective]
    resolve(config)
    if not preset.weighs and config.advantages != "ones":
        raise ValueError(
            f"advantages must be 'ones' with objective {config.objective!r}, got {config.advantages!r}; "
            "imitation weighs every response alike."
        )
    if preset.constant_denominator and config.reduction == "sequence-mean":
        raise ValueError(
            f"reduction must be 'token-mean' with objective {config.objective!r}, got 'sequence-mean'; "
            "its denominator is the same for every response."
        )
    config.reduction = config.reduction or preset.reduction
    config.normalize = config.normalize or ("mean" if config.objective == "dr_grpo" else "std")
    for name in CHOSEN:
        if getattr(config, name) is None:
            setattr(config, name, preset.options.get(name))


def resolve(config: GFTConfig) -> Objective:
    """The objective as `policy_loss` understands it. Raises ValueError as it does."""
    one_row = torch.zeros(1)
    return objectives.objective_of(
        config.objective,
        {name: getattr(config, name) for name in CHOSEN} | {"old_log_probs": None},
        beta=config.beta,
        entropy_coef=config.entropy_coef,
        ref_log_probs=one_row,  # the trainer brings them where they are needed
        return_stats=True,
        targets=one_row.long(),
    )


def described(config: GFTConfig) -> str:
    """The objective and its options, for a line of text."""
    given = [f"{name} {getattr(config, name)}" for name in CHOSEN if getattr(config, name) is not None]
    return ", ".join([config.objective, *given])


def has_ratio(config: GFTConfig) -> bool:
    """Whether the objective compares the policy with the one that sampled."""
    return PRESETS[config.objective].surrogate != "gft"


def clip_range(config: GFTConfig) -> tuple[float, float]:
    """(lowest, highest) ratio pi / pi_old that counts as near: the objective's own bounds, or 1 - CLIP and 1 + CLIP."""
    if not has_ratio(config):
        return 1.0 - CLIP, 1.0 + CLIP
    own = resolve(config)
    return (0.0 if config.objective == "cispo" else 1.0 - own.clip_low), 1.0 + own.clip_high


def has_constant_denominator(config: GFTConfig) -> bool:
    return PRESETS[config.objective].constant_denominator


def call_options(config: GFTConfig) -> dict[str, Any]:
    """What a training forward of the patched model is given beside its tensors."""
    names = ("objective", "beta", "entropy_coef", "reduction", *CHOSEN)
    return {f"gft_{name}": getattr(config, name) for name in names}
