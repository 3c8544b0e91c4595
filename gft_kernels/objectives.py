"""The objectives by name: their surrogate, the options they take with their defaults, and their usual reduction.

An option that an objective does not use is an error that names it: ignored in silence, it would look as if it worked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gft_kernels import checks, formulas, sequences, surrogates
from gft_kernels.arguments import PolicyOptions
from gft_kernels.memo import by_value
from gft_kernels.options import REDUCTIONS, RULE_FIELDS, LinearCall, Objective, RowCall, RowResult, Rule, on_rows

KL_ESTIMATORS = ("k1", "k2", "k3")  # of Schulman 2020, as Objective.kl_estimator numbers them
"""Written out for torch.compile: PyTorch 2.11 does not trace vars() of a dataclass as arguments."""


@dataclass(frozen=True)
class Preset:
    """What tells one objective from another before it is computed."""

    surrogate: str
    reduction: str
    options: dict[str, Any]
    weighs: bool = True  # by an advantage; False: A = 1
    constant_denominator: bool = False  # num_items_in_batch must be given
    anchored: bool = False  # beta must be given
    tau: float = 0.7  # what it is of gft
    over_sequence: str = ""  # how its ratio is a response's (options.SEQUENCE_RATIOS); "": a token's


def _of_responses(how: str, clip_low: float, clip_high: float) -> Preset:
    options = {"clip_low": clip_low, "clip_high": clip_high, "old_log_probs": None}
    return Preset("grpo", "sequence-mean", options, over_sequence=how)


def _clipped(reduction: str, clip_high: float, **rest: Any) -> Preset:
    options = {"clip_low": 0.2, "clip_high": clip_high, "delta": None, "old_log_probs": None}
    return Preset("grpo", reduction, options, **rest)


PRESETS = {
    "gft": Preset("gft", "token-mean", {"tau": 0.7, "rectify": "all", "gamma": 0.1}),
    "sft": Preset("gft", "token-mean", {}, weighs=False, tau=0.0),
    "dft": Preset("gft", "token-mean", {}, weighs=False, tau=1.0),
    "asft": Preset("gft", "token-mean", {}, weighs=False, tau=1.0, anchored=True),
    "eaft": Preset("eaft", "token-mean", {"entropy_power": 1.0}, weighs=False),
    "psft": Preset("grpo", "token-mean", {"clip_high": 0.28, "old_log_probs": None}, weighs=False),
    "luffy": Preset("luffy", "token-mean", {"gamma": 0.1}),
    "chord": Preset("chord", "token-mean", {}, weighs=False),
    "grpo": _clipped("sequence-mean", 0.2),
    "bnpo": _clipped("token-mean", 0.2),
    "dapo": _clipped("token-mean", 0.28),
    "dr_grpo": _clipped("token-mean", 0.2, constant_denominator=True),
    "gspo": _of_responses("mean", 3e-4, 4e-4),
    "gmpo": _of_responses("geometric", 0.4, 0.4),
    "cispo": Preset("cispo", "token-mean", {"clip_low": 1.0, "clip_high": 4.0, "old_log_probs": None}),
    "sapo": Preset("sapo", "sequence-mean", {"gate_positive": 1.0, "gate_negative": 1.05, "old_log_probs": None}),
}
RECTIFIES = ("all", "positive", "bounded", "given")
"""Where gft's C acts; the last two are rules of the first two with a gamma, or on some rows alone."""
OWN = tuple(dict.fromkeys(name for preset in PRESETS.values() for name in preset.options))
"""Options that only some objectives take."""
OWN_NUMBERS = tuple(name for name in OWN if name != "old_log_probs")
NUMBERS = ("objective", "given_objective", "beta", "entropy_coef", "kl_estimator", "kl_cap", *OWN_NUMBERS)
"""Options that make an objective without a tensor."""


def resolve(given: PolicyOptions, targets: Any) -> tuple[Objective, str]:
    """The objective and the reduction of a call. Raises ValueError, TypeError."""
    name, reduction, items = given["objective"], given["reduction"], given["num_items_in_batch"]
    checks.flag("return_stats", given["return_stats"])
    chosen = objective_of(given, targets)
    preset = PRESETS[name]
    if not preset.weighs:
        for argument, value in (("advantages", given["advantages"]), ("rewards", given["rewards"])):
            if value is not None:
                raise ValueError(
                    f"{argument} must be left out with objective={name!r}, got {checks.shown(value)}; A = 1 there, "
                    f"and objective='gft' with tau={preset.tau:g} weighs the same loss by an advantage"
                )
    _check_given_credit(given)
    reduction = preset.reduction if reduction is None else reduction
    checks.one_of("reduction", reduction, REDUCTIONS)
    if preset.constant_denominator and reduction in ("token-mean", "sequence-mean") and items is None:
        raise ValueError(
            f"num_items_in_batch must be given with objective={name!r}, got None; its denominator is a constant, "
            "such as responses in the batch times the longest response allowed"
        )
    return chosen, reduction


def _check_given_credit(given: PolicyOptions) -> None:
    """Rewards would weigh what an imitation weighs by 1. Raises ValueError."""
    name = given["given_objective"]
    if name is None or PRESETS[name].weighs or given["advantages"] is not None:
        return
    got = "rewards" if given["rewards"] is not None else "neither them nor rewards"
    raise ValueError(
        f"advantages must be given with given_objective={name!r}, got {got}; every row is weighed by its advantage, so "
        "pass group_advantages(rewards) with 1 in place of those of the given responses"
    )


def objective_of(asked: PolicyOptions, targets: Tensor) -> Objective:
    """The objective of options, each of which one of its objectives takes. Raises ValueError, TypeError."""
    name, given_objective, sequence_ids = asked["objective"], asked["given_objective"], asked["sequence_ids"]
    checks.check_tensor("targets", targets, checks.INDEX_DTYPES, None, None, "pass one token id per row")
    numbers = _numbers(*[asked[option] for option in NUMBERS])  # type: ignore[literal-required]
    names = [name] if given_objective is None else [name, given_objective]
    _refuse_foreign(names, {"old_log_probs": asked["old_log_probs"]})
    _check_sequences(names, targets, sequence_ids)
    _check_reference(asked, numbers.beta)
    wants = given_objective is not None or asked["rectify"] == "given"
    given_R = _given_rows(asked["given"], wants, targets, sequence_ids)
    old_R = _log_probs("old_log_probs", asked["old_log_probs"], targets)
    ref_R = _log_probs("ref_log_probs", asked["ref_log_probs"], targets)
    if given_R is old_R is ref_R is None:
        return numbers
    return replace(numbers, given_R=given_R, old_log_probs_R=old_R, ref_log_probs_R=ref_R)


@by_value
def _numbers(
    name: Any, given_objective: Any, beta: Any, entropy_coef: Any, kl_estimator: Any, kl_cap: Any, *own: Any
) -> Objective:
    """The objective without its tensors, from `NUMBERS`. Raises ValueError, TypeError."""
    checks.one_of("objective", name, tuple(PRESETS))
    names = [name]
    if given_objective is not None:
        checks.one_of("given_objective", given_objective, tuple(PRESETS))
        names.append(given_objective)
    options = dict(zip(OWN_NUMBERS, own, strict=True))
    _refuse_foreign(names, options)
    rule, other = _rule(name, options), _rule(names[-1], options)
    if options["rectify"] == "given":
        rule, other = replace(rule, rectify="all", tau=0.0), replace(other, rectify="all")
    beta = checks.not_negative("beta", beta, "0 is none: no penalty")
    if beta == 0.0 and any(PRESETS[each].anchored for each in names):
        raise ValueError("beta must be positive with objective 'asft', got 0; without its anchor that is dft")
    bonus = checks.real("entropy_coef", entropy_coef, checks.is_finite, "be finite", "0 is none: no bonus")
    return Objective(
        **{name: getattr(rule, name) for name in RULE_FIELDS},
        over_sequence=PRESETS[name].over_sequence,
        given=other,
        beta=beta,
        entropy_coef=checks.fits_float32("entropy_coef", bonus, "pass a smaller one"),
        **_penalty(kl_estimator, kl_cap, beta),
    )


def _refuse_foreign(names: list[str], options: dict[str, Any]) -> None:
    """Options that no objective of the call takes. Raises ValueError."""
    for argument, value in options.items():
        if value is None or any(argument in PRESETS[name].options for name in names):
            continue
        takers = ", ".join(other for other, known in PRESETS.items() if argument in known.options)
        of_call = " and ".join(f"{place}={name!r}" for place, name in zip(("objective", "given_objective"), names))  # noqa: B905
        raise ValueError(f"{argument} must be left out with {of_call}, got {checks.shown(value)}; {takers} use it")


def _check_sequences(names: list[str], targets: Tensor, sequence_ids: Any) -> None:
    """A response's ratio needs to know its rows, and leaves pi_old to no one else. Raises ValueError."""
    name, given = names[0], names[-1]
    with_ratio = "old_log_probs" in PRESETS[given].options
    if len(names) > 1 and (PRESETS[given].over_sequence or (PRESETS[name].over_sequence and with_ratio)):
        raise ValueError(
            f"given_objective must have no ratio beside objective={name!r}, got {given!r}; where the ratio is a "
            "response's, given rows can be under gft, sft, dft, asft, eaft, luffy or chord"
        )
    if PRESETS[name].over_sequence and targets.dim() == 1 and sequence_ids is None:
        raise ValueError(
            f"sequence_ids must be given for packed rows with objective={name!r}, got None; "
            "pass the response id of each row"
        )


def _rule(name: str, options: dict[str, Any]) -> Rule:
    """The rule of that name with what it takes of the options. Raises ValueError, TypeError."""
    preset = PRESETS[name]
    chosen = {option: value for option, value in options.items() if value is not None and option in preset.options}
    given = {**preset.options, **chosen}
    rectify = given.get("rectify", "all")
    tau = checks.check_coefficient(given.get("tau", preset.tau), rectify, RECTIFIES)
    clip_low, clip_high, delta = _bounds(given)
    usual = "leave it out for the default"
    positive, negative, power = (
        checks.positive_float32(option, given.get(option, 1.0), usual)
        for option in ("gate_positive", "gate_negative", "entropy_power")
    )
    gamma = checks.positive_float32("gamma", given["gamma"], usual) if "gamma" in given else 0.0
    if preset.surrogate == "gft":
        if options.get("gamma") is not None and "gamma" in given and rectify != "bounded":
            raise ValueError(
                f"gamma must be left out with rectify={rectify!r}, got {gamma:g}; rectify='bounded' pushes by it"
            )
        gamma = gamma if rectify == "bounded" else 0.0
        rectify = "positive" if rectify == "bounded" else rectify
    return Rule(preset.surrogate, tau, rectify, clip_low, clip_high, delta, gamma, positive, negative, power)


def _given_rows(given: Any, wanted: bool, targets: Tensor, sequence_ids: Any) -> Tensor | None:
    """(R,) bool of rows that are given, from one per row or per response. Raises ValueError, TypeError."""
    remedy = "pass True for the responses (S,), or the rows, that were not sampled"
    if not wanted:
        if given is None:
            return None
        raise ValueError(
            f"given must be left out without given_objective, got {checks.shown(given)}; name the objective of those "
            "rows, or pass rectify='given'"
        )
    if given is None:
        raise ValueError(f"given must be given with given_objective or rectify='given', got None; {remedy}")
    checks.check_tensor("given", given, (torch.bool,), None, targets.device, remedy)
    if given.shape == targets.shape:
        return given.detach().reshape(-1).contiguous()
    if targets.dim() == 2 and given.shape == targets.shape[:1]:
        return on_rows(given.detach(), None, targets.shape[1], outside=False)
    if isinstance(sequence_ids, Tensor) and sequence_ids.shape == targets.shape and given.dim() == 1 and given.numel():
        return on_rows(given.detach(), sequence_ids.detach().long(), targets.shape[-1], outside=False)
    raise ValueError(
        f"given must have shape {tuple(targets.shape)} or one entry per response, got {tuple(given.shape)}; {remedy}"
    )


def _bounds(given: dict[str, Any]) -> tuple[float, float, float]:
    """clip_low, clip_high and delta, inf for none."""
    low, high, delta = given.get("clip_low", 1.0), given.get("clip_high", 0.0), given.get("delta")
    below, above = "ratios are clipped below 1 - clip_low", "ratios are clipped above 1 + clip_high"
    low = checks.real("clip_low", low, lambda x: 0.0 <= x <= 1.0, "lie in [0, 1]", below)
    high = checks.not_negative("clip_high", high, above)
    if delta is None:
        return low, high, math.inf
    remedy = "it bounds the ratio where A < 0; None is no bound"
    given_delta, delta = delta, checks.real("delta", delta, lambda _: True, "be finite and above 1 + clip_high", remedy)
    if not 1.0 + high < delta < math.inf:  # the sentence's number is written here alone: a traced one has no digits
        shown = checks.shown(given_delta)
        raise ValueError(f"delta must be finite and above 1 + clip_high = {1.0 + high:g}, got {shown}; {remedy}")
    return low, high, checks.fits_float32("delta", delta, remedy)


def _check_reference(asked: PolicyOptions, beta: float) -> None:
    """Penalty and reference come together. Raises ValueError."""
    if beta != 0.0 and asked["ref_log_probs"] is None:
        raise ValueError(
            f"ref_log_probs must be given with beta={beta:g}, got None; pass the reference's token_log_probs, or beta=0"
        )
    if beta == 0.0 and asked["ref_log_probs"] is not None and not asked["return_stats"]:
        raise ValueError(
            "ref_log_probs must be left out with beta=0, got a tensor; nothing uses it but return_stats=True"
        )


def _penalty(estimator: Any, kl_cap: Any, beta: float) -> dict[str, Any]:
    """The estimator's number and the cap, inf for none."""
    if estimator is not None:
        checks.one_of("kl_estimator", estimator, KL_ESTIMATORS)
        if beta == 0.0:
            raise ValueError(f"kl_estimator must be left out with beta=0, got {estimator!r}; there is no penalty")
    number = 1 + KL_ESTIMATORS.index(estimator or "k3")
    if kl_cap is None:
        return {"kl_estimator": number, "kl_cap": math.inf}
    kl_cap = checks.positive_float32("kl_cap", kl_cap, "None is no cap")
    if beta == 0.0:
        raise ValueError(f"kl_cap must be left out with beta=0, got {kl_cap:g}; there is no penalty to bound")
    if estimator == "k1":
        raise ValueError(f"kl_cap must be left out with kl_estimator='k1', got {kl_cap:g}; its pull is beta everywhere")
    return {"kl_estimator": number, "kl_cap": kl_cap}


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
    held_R = torch.zeros_like(live_R)
    if o.over_sequence:  # of the response, as the loss has it
        o, held_R, _ = sequences.settle(o, call.credit, log_probs_R, result.advantages_R)
    if any(rule.surrogate in surrogates.WITH_RATIO for rule in o.rules):
        old_R = log_probs_R if o.old_log_probs_R is None else o.old_log_probs_R
        ratios_R = torch.exp(formulas.log_ratio(log_probs_R, old_R))
        over_R, has_R = held_R, torch.zeros_like(live_R)
        for i, rule in enumerate(o.rules):
            under_R = live_R if o.given_R is None else live_R & (o.given_R if i else ~o.given_R)
            over_R = over_R | (under_R & surrogates.is_bounded(ratios_R, result.advantages_R, rule))
            has_R = has_R | (under_R & (rule.surrogate in surrogates.WITH_RATIO))
        added = {"ratios": torch.where(has_R, ratios_R, 0.0), "clipped": has_R & over_R}
    if o.ref_log_probs_R is not None:
        kl_R = formulas.kl_loss(formulas.log_ratio(o.ref_log_probs_R, log_probs_R), o.kl_cap, o.kl_estimator)
        added["kl"] = torch.where(live_R, kl_R, 0.0)
    return {name: values_R.view(shape) for name, values_R in added.items()}
