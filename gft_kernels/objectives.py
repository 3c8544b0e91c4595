"""The objectives by name: their surrogate, the options they take with their defaults, and their usual reduction.

An option that an objective does not use is an error that names it: ignored in silence, it would look as if it worked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gft_kernels import checks, formulas
from gft_kernels.arguments import PolicyOptions
from gft_kernels.options import REDUCTIONS, LinearCall, Objective, RowCall, RowResult


@dataclass(frozen=True)
class Preset:
    """What tells one objective from another before it is computed."""

    surrogate: str
    reduction: str
    options: dict[str, Any]
    weighs: bool = True  # by an advantage; False: A = 1
    constant_denominator: bool = False  # num_items_in_batch must be given
    tau: float = 0.7  # what it is of gft


def _clipped(reduction: str, clip_high: float, **rest: Any) -> Preset:
    options = {"clip_low": 0.2, "clip_high": clip_high, "delta": None, "old_log_probs": None}
    return Preset("grpo", reduction, options, **rest)


PRESETS = {
    "gft": Preset("gft", "token-mean", {"tau": 0.7, "rectify": "all"}),
    "sft": Preset("gft", "token-mean", {}, weighs=False, tau=0.0),
    "dft": Preset("gft", "token-mean", {}, weighs=False, tau=1.0),
    "grpo": _clipped("sequence-mean", 0.2),
    "dapo": _clipped("token-mean", 0.28),
    "dr_grpo": _clipped("token-mean", 0.2, constant_denominator=True),
    "cispo": Preset("cispo", "token-mean", {"clip_high": 4.0, "old_log_probs": None}),
}
_OWN = ("tau", "rectify", "clip_low", "clip_high", "delta", "old_log_probs")  # options that only some objectives take


def resolve(given: PolicyOptions, targets: Any) -> tuple[Objective, str]:
    """The objective and the reduction of a call. Raises ValueError, TypeError."""
    name, reduction, items = given["objective"], given["reduction"], given["num_items_in_batch"]
    checks.flag("return_stats", given["return_stats"])
    chosen = objective_of(
        name,
        {option: given[option] for option in _OWN},  # type: ignore[literal-required]
        beta=given["beta"],
        entropy_coef=given["entropy_coef"],
        ref_log_probs=given["ref_log_probs"],
        kl_cap=given["kl_cap"],
        return_stats=given["return_stats"],
        targets=targets,
    )
    preset = PRESETS[name]
    if not preset.weighs:
        for argument, value in (("advantages", given["advantages"]), ("rewards", given["rewards"])):
            if value is not None:
                raise ValueError(
                    f"{argument} must be left out with objective={name!r}, got {checks.shown(value)}; A = 1 there, "
                    f"and objective='gft' with tau={preset.tau:g} weighs the same loss by an advantage"
                )
    reduction = preset.reduction if reduction is None else reduction
    checks.one_of("reduction", reduction, REDUCTIONS)
    if preset.constant_denominator and reduction in ("token-mean", "sequence-mean") and items is None:
        raise ValueError(
            f"num_items_in_batch must be given with objective={name!r}, got None; its denominator is a constant, "
            "such as responses in the batch times the longest response allowed"
        )
    return chosen, reduction


def objective_of(
    name: str,
    options: dict[str, Any],
    *,
    beta: float,
    entropy_coef: float,
    ref_log_probs: Tensor | None,
    return_stats: bool,
    targets: Tensor,
    kl_cap: float | None = None,
) -> Objective:
    """The objective of that name; `options`: those that only some objectives take. Raises ValueError, TypeError."""
    checks.one_of("objective", name, tuple(PRESETS))
    checks.check_tensor("targets", targets, checks.INDEX_DTYPES, None, None, "pass one token id per row")
    preset, remedy = PRESETS[name], "0 is none"
    for argument, value in options.items():
        if value is not None and argument not in preset.options:
            takers = ", ".join(other for other, known in PRESETS.items() if argument in known.options)
            raise ValueError(
                f"{argument} must be left out with objective={name!r}, got {checks.shown(value)}; {takers} use it"
            )
    given = {**preset.options, **{argument: value for argument, value in options.items() if value is not None}}
    beta = checks.fits_float32("beta", checks.not_negative("beta", beta, f"{remedy}: no penalty"), "pass a smaller one")
    bonus = checks.real("entropy_coef", entropy_coef, checks.is_finite, "be finite", f"{remedy}: no bonus")
    clip_low, clip_high, delta = _bounds(given)
    return Objective(
        surrogate=preset.surrogate,
        tau=checks.check_coefficient(given.get("tau", preset.tau), given.get("rectify", "all")),
        rectify=given.get("rectify", "all"),
        clip_low=clip_low,
        clip_high=clip_high,
        beta=beta,
        entropy_coef=checks.fits_float32("entropy_coef", bonus, "pass a smaller one"),
        delta=delta,
        kl_cap=_kl_cap(kl_cap, beta, ref_log_probs, return_stats),
        old_log_probs_R=_log_probs("old_log_probs", given.get("old_log_probs"), targets),
        ref_log_probs_R=_log_probs("ref_log_probs", ref_log_probs, targets),
    )


def _bounds(given: dict[str, Any]) -> tuple[float, float, float]:
    """clip_low, clip_high and delta, inf for none."""
    low, high, delta = given.get("clip_low", 0.0), given.get("clip_high", 0.0), given.get("delta")
    below, above = "ratios are clipped below 1 - clip_low", "ratios are clipped above 1 + clip_high"
    low = checks.real("clip_low", low, lambda x: 0.0 <= x <= 1.0, "lie in [0, 1]", below)
    high = checks.fits_float32("clip_high", checks.not_negative("clip_high", high, above), above)
    if delta is None:
        return low, high, math.inf
    remedy = "it bounds the ratio where A < 0; None is no bound"
    given_delta, delta = delta, checks.real("delta", delta, lambda _: True, "be finite and above 1 + clip_high", remedy)
    if not 1.0 + high < delta < math.inf:  # the sentence's number is written here alone: a traced one has no digits
        shown = checks.shown(given_delta)
        raise ValueError(f"delta must be finite and above 1 + clip_high = {1.0 + high:g}, got {shown}; {remedy}")
    return low, high, checks.fits_float32("delta", delta, remedy)


def _kl_cap(kl_cap: Any, beta: float, ref_log_probs: Tensor | None, return_stats: bool) -> float:
    """The cap, inf for none; and that penalty and reference come together."""
    if beta != 0.0 and ref_log_probs is None:
        raise ValueError(
            f"ref_log_probs must be given with beta={beta:g}, got None; pass the reference's token_log_probs, or beta=0"
        )
    if beta == 0.0 and ref_log_probs is not None and not return_stats:
        raise ValueError(
            "ref_log_probs must be left out with beta=0, got a tensor; nothing uses it but return_stats=True"
        )
    if kl_cap is None:
        return math.inf
    kl_cap = checks.positive("kl_cap", kl_cap, "None is no cap")
    checks.fits_float32("kl_cap", kl_cap, "None is no cap", smallest=checks.FLOAT32.tiny)
    if beta == 0.0:
        raise ValueError(f"kl_cap must be left out with beta=0, got {kl_cap:g}; there is no penalty to bound")
    return kl_cap


def _log_probs(name: str, value: Tensor | None, targets: Tensor) -> Tensor | None:
    """(R,) float32 and detached, from the shape of the targets."""
    if value is None:
        return None
    remedy = "pass one log-probability per target, in nats"
    checks.check_tensor(name, value, None, tuple(targets.shape), targets.device, remedy)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {value.dtype}; {remedy}")
    return value.detach().to(torch.float32).reshape(-1).contiguous()


def ratios(result: RowResult, call: RowCall | LinearCall, shape: torch.Size) -> dict[str, Tensor]:
    """ratios, clipped and kl of `TokenStats`, where the call's objective has them."""
    o, live_R, log_probs_R, added = call.objective, call.credit.live_R, result.log_probs_R, {}
    if o.surrogate != "gft":
        old_R = log_probs_R if o.old_log_probs_R is None else o.old_log_probs_R
        ratios_R = torch.exp(formulas.log_ratio(log_probs_R, old_R))
        over_R = ratios_R > 1.0 + o.clip_high
        if o.surrogate == "grpo":
            over_R = formulas.is_clipped(ratios_R, result.advantages_R, o.clip_low, o.clip_high, o.delta)
        added = {"ratios": torch.where(live_R, ratios_R, 0.0), "clipped": live_R & over_R}
    if o.ref_log_probs_R is not None:
        kl_R = formulas.kl_loss(formulas.log_ratio(o.ref_log_probs_R, log_probs_R), o.kl_cap)
        added["kl"] = torch.where(live_R, kl_R, 0.0)
    return {name: values_R.view(shape) for name, values_R in added.items()}
