"""The methods that are compared: each a handful of GFTConfig options on top of the study's own.

Every stage of every method is one GFTTrainer run. GRPO is a group of samples only with C = 1 (tau = 0): on-policy, with
one update per rollout, the clipped ratio is 1 and that is GRPO exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, field

THEN = ">"  # joins the stages of a pipeline: sft>gft>grpo


@dataclass(frozen=True)
class Method:
    """label: as the report prints it. options: a group's `num_generations` is what its demonstrations leave of the
    study's group, unless given here. tuned_as: whose tuned learning rate it takes; None: the highest rate tried. data:
    how many times the rows, and the rows per step, of the others. expert: whether the expert makes a difference, by its
    demonstrations or by the rate that was tuned with it. trains: whether anything is trained."""

    label: str
    options: dict = field(default_factory=dict)
    tuned_as: str | None = None
    data: int = 1
    expert: bool = True
    trains: bool = True


def _imitation(label: str, demonstrations: int, tau: float, tuned_as: str | None, data: int = 1) -> Method:
    options = {"advantages": "ones", "num_demonstrations": demonstrations, "num_generations": 0, "tau": tau}
    return Method(label, options, tuned_as, data)


def _group(label: str, given: int = 4, tuned_as: str = "gft", **options) -> Method:
    expert = not tuned_as.startswith("grpo")
    return Method(label, {"tau": 0.7, "num_demonstrations": given, **options}, tuned_as, expert=expert)


METHODS = {
    "none": Method("no training", expert=False, trains=False),
    "sft": _imitation("SFT", 1, 0.0, "sft"),
    "sft-same": _imitation("SFT, GFT's rate", 1, 0.0, "gft"),
    "sft-fast": _imitation("SFT, highest rate", 1, 0.0, None),
    "sft-mix": _imitation("SFT (mix)", 4, 0.0, "sft-mix"),
    "sft-10x": _imitation("SFT, 10 × data", 1, 0.0, "sft-10x", data=10),
    "dft": _imitation("DFT", 1, 1.0, "dft"),
    "grpo": _group("GRPO", 0, "grpo", tau=0.0),
    "grpo-4": _group("GRPO, 4 samples", 0, "grpo-4", tau=0.0, num_generations=4),
    "gft": _group("GFT"),
    "gft-positive": _group("GFT, C where A > 0", tuned_as="gft-positive", rectify="positive"),
    "gft-positive-same": _group("GFT, C where A > 0, GFT's rate", rectify="positive"),
    "gft-given": _group("GFT, C on demonstrations", tuned_as="gft-given", rectify="given"),
    "gft-bounded": _group("GFT, bounded negatives", tuned_as="gft-bounded", rectify="bounded"),
    "gft-split": _group("GFT, split advantages", tuned_as="gft-split", normalize="split"),
    "gft-no-mix": _group("GFT, no teachers", 1, "gft-no-mix"),
    **{f"gft-tau-{tau:g}": _group(f"GFT, τ = {tau:g}", tau=tau) for tau in (0.0, 0.1, 0.3, 0.5, 1.0)},
    **{f"gft-{given}-{8 - given}": _group(f"GFT, {given} given", given) for given in (0, 2, 6, 8)},
    "luffy": _group("LUFFY, GFT's rate", 1, tau=None, objective="dapo", given_objective="luffy"),
    # μ = 0.1 of the loss is the expert's, 1 - μ that of the seven samples beside it
    "chord": _group(
        "CHORD-φ, GFT's rate", 1, tau=None, objective="dapo", given_objective="chord", given_weight=7 * 0.1 / 0.9
    ),
    "gft-mean": _group("GFT, no division by std", normalize="mean"),
    "gft-leave-one-out": _group("GFT, leave-one-out", normalize="leave-one-out"),
}


def stages(chain: str) -> list[str]:
    """The methods of a pipeline, in order."""
    return chain.split(THEN)


def label_of(chain: str) -> str:
    return " → ".join(METHODS[stage].label for stage in stages(chain))


def depends_on_expert(chain: str) -> bool:
    return any(METHODS[stage].expert for stage in stages(chain))
