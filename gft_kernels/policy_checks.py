"""What only `policy_loss` takes: an objective by name, with its defaults, and which options it refuses.

An option that an objective does not use is an error that names it: ignored in silence, it would look as if it worked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gft_kernels import checks
from gft_kernels.options import Objective


@dataclass(frozen=True)
class Preset:
    """An objective's surrogate, the options it takes with their defaults, and its usual reduction."""

    surrogate: str
    reduction: str
    options: dict[str, Any]
    weighs: bool = True  # by an advantage; False: A = 1
    constant_denominator: bool = False  # num_items_in_batch must be given


_RATIO = {"old_log_probs": None}
PRESETS = {
    "gft": Preset("gft", "token-mean", {"tau": 0.7, "rectify": "all"}),
    "sft": Preset("gft", "token-mean", {}, weighs=False),
    "dft": Preset("gft", "token-mean", {}, weighs=False),
    "grpo": Preset("grpo", "sequence-mean", {"clip_low": 0.2, "clip_high": 0.2, **_RATIO}),
    "dapo": Preset("grpo", "token-mean", {"clip_low": 0.2, "clip_high": 0.28, **_RATIO}),
    "dr_grpo": Preset("grpo", "token-mean", {"clip_low": 0.2, "clip_high": 0.2, **_RATIO}, constant_denominator=True),
    "cispo": Preset("cispo", "token-mean", {"clip_high": 4.0, **_RATIO}),
}
_TAUS = {"sft": 0.0, "dft": 1.0}  # what sft and dft are of gft


def check_credit(name: str, advantages: Tensor | None, rewards: Tensor | None) -> None:
    """Imitation has A = 1. Raises ValueError."""
    if PRESETS[name].weighs:
        return
    for argument, value in (("advantages", advantages), ("rewards", rewards)):
        if value is not None:
            raise ValueError(
                f"{argument} must be left out with objective={name!r}, got a tensor; A = 1 there, and objective='gft' "
                f"with tau={_TAUS[name]:g} weighs the same loss by an advantage"
            )


def reduction_of(name: str, reduction: str | None, num_items_in_batch: float | Tensor | None) -> str:
    """The reduction asked for, or the objective's own. Raises ValueError."""
    chosen = PRESETS[name].reduction if reduction is None else reduction
    divides = chosen in ("token-mean", "sequence-mean")
    if PRESETS[name].constant_denominator and divides and num_items_in_batch is None:
        raise ValueError(
            f"num_items_in_batch must be given with objective={name!r}, got None; its denominator is a constant, "
            "such as responses in the batch times the longest response allowed"
        )
    return chosen


def check_path(weight: Tensor | None, linear: dict[str, object], inplace: bool) -> None:
    """What only one of the two paths takes: `linear` with a head, inplace without. Raises ValueError."""
    if weight is not None and inplace:
        raise ValueError("inplace must be False with weight, got True; hidden states are not overwritten")
    for argument, value in linear.items():
        if weight is None and value is not None:
            raise ValueError(
                f"{argument} must be left out without weight, got {_shown(value)}; with logits there is no product"
            )


def objective_of(
    name: str,
    options: dict[str, Any],
    *,
    beta: float,
    entropy_coef: float,
    ref_log_probs: Tensor | None,
    return_stats: bool,
    targets: Tensor,
) -> Objective:
    """The objective of that name; `options`: those that only some objectives take. Raises ValueError, TypeError."""
    checks.one_of("objective", name, tuple(PRESETS))
    checks.check_tensor("targets", targets, checks.INDEX_DTYPES, None, None, "pass one token id per row")
    known = PRESETS[name].options
    for argument, value in options.items():
        if value is not None and argument not in known:
            raise ValueError(
                f"{argument} must be left out with objective={name!r}, got {_shown(value)}; {_takers(argument)} use it"
            )
    given = {argument: known[argument] if options[argument] is None else options[argument] for argument in known}
    gft = checks.gft_objective(given.get("tau", _TAUS.get(name, 0.7)), given.get("rectify", "all"))
    _check_clips(given)
    _check_penalties(beta, entropy_coef, ref_log_probs, return_stats)
    return Objective(
        surrogate=PRESETS[name].surrogate,
        tau=gft.tau,
        rectify=gft.rectify,
        clip_low=float(given.get("clip_low", 0.0)),
        clip_high=float(given.get("clip_high", 0.0)),
        beta=float(beta),
        entropy_coef=float(entropy_coef),
        old_log_probs_R=_log_probs("old_log_probs", given.get("old_log_probs"), targets),
        ref_log_probs_R=_log_probs("ref_log_probs", ref_log_probs, targets),
    )


def _check_clips(given: dict) -> None:
    if not 0.0 <= given.get("clip_low", 0.0) <= 1.0:
        raise ValueError(f"clip_low must lie in [0, 1], got {given['clip_low']}; ratios are clipped below 1 - clip_low")
    high = given.get("clip_high", 0.0)
    if not (checks.is_finite(high) and high >= 0.0):
        raise ValueError(
            f"clip_high must be finite and not negative, got {high}; ratios are clipped above 1 + clip_high"
        )


def _check_penalties(beta: float, entropy_coef: float, ref_log_probs: Tensor | None, return_stats: bool) -> None:
    if not (checks.is_finite(beta) and beta >= 0.0):
        raise ValueError(f"beta must be finite and not negative, got {beta}; 0 is no penalty")
    if not checks.is_finite(entropy_coef):
        raise ValueError(f"entropy_coef must be finite, got {entropy_coef}; 0 is no bonus")
    if beta != 0.0 and ref_log_probs is None:
        raise ValueError(
            f"ref_log_probs must be given with beta={beta:g}, got None; pass the reference's token_log_probs, or beta=0"
        )
    if beta == 0.0 and ref_log_probs is not None and not return_stats:
        raise ValueError(
            "ref_log_probs must be left out with beta=0, got a tensor; nothing uses it but return_stats=True"
        )


def _log_probs(name: str, value: Tensor | None, targets: Tensor) -> Tensor | None:
    """(R,) float32 and detached, from the shape of the targets."""
    if value is None:
        return None
    remedy = "pass one log-probability per target, in nats"
    checks.check_tensor(name, value, None, tuple(targets.shape), targets.device, remedy)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {value.dtype}; {remedy}")
    return value.detach().to(torch.float32).reshape(-1).contiguous()


def _shown(value: object) -> str:
    return "a tensor" if isinstance(value, Tensor) else repr(value)


def _takers(argument: str) -> str:
    return ", ".join(name for name, known in PRESETS.items() if argument in known.options)
