"""What a trainer's configuration says of the GFT loss: one text of names, defaults, help and checks for all trainers.

Each is a mixin before the host's own arguments: `class GFTConfig(GroupLossOptions, TrainingArguments)`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from gft_kernels import checks, linear_checks
from gft_kernels.objectives import PRESETS
from gft_kernels.options import BACKENDS, NORMALIZE, RECTIFY

MEAN_REDUCTIONS = ("token-mean", "sequence-mean")


def option(default: Any, text: str, section: str | None = None) -> Any:
    """A field with its meaning; `section` begins one in the listing of a configuration's keys."""
    return field(default=default, metadata={"help": text} | ({"section": section} if section else {}))


def at_least(config: Any, low: int, *names: str) -> None:
    """Raises ValueError for an option that is no whole number of at least `low`."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}.")


@dataclass
class TokenLossOptions:
    """The loss of a token, and where it is computed."""

    tau: float | None = option(
        None, "gft: C(pi) = pi below tau, else 1 (F4; 0 is SFT, 1 DFT where A = 1); None: 0.7.", section="Loss"
    )
    backend: str = option("auto", "Loss backend: auto, reference, cpu, triton or cuda.")
    filter_eps: float | str | None = option(
        None, "How much the head's backward may leave out; None: nothing, 'auto': what its dtype's rounding hides."
    )
    token_metrics: bool = option(True, "Log mean pi, entropy and rectified fraction (reads zero-advantage rows too).")

    rectifies: ClassVar[Sequence[str]] = RECTIFY  # of what a host says of its rows, none is "given"

    def __post_init__(self):
        self.check_loss()
        order_liger(self)
        super().__post_init__()  # type: ignore[misc]

    def check_loss(self) -> None:
        """Fills in gft's defaults. Raises ValueError, one sentence, for a value out of range."""
        if getattr(self, "objective", "gft") == "gft":
            for name in ("tau", "rectify"):
                if getattr(self, name, "") is None:
                    setattr(self, name, PRESETS["gft"].options[name])
            self.tau = checks.check_coefficient(self.tau, getattr(self, "rectify", "all"), self.rectifies)
        if isinstance(self.filter_eps, str) and self.filter_eps != "auto":  # a command line brings text
            with contextlib.suppress(ValueError):
                self.filter_eps = float(self.filter_eps)
        linear_checks.filter_eps(self.filter_eps, torch.float32)
        checks.one_of("backend", self.backend, BACKENDS)


@dataclass
class GroupLossOptions(TokenLossOptions):
    """The same over groups of responses: what their rewards weigh, and what a step is the mean of."""

    NORMALIZATIONS: ClassVar[tuple[str, ...]] = NORMALIZE  # those that this trainer knows

    rectify: str | None = option(
        None, "gft: 'all' is the paper; 'positive': C only where A > 0; None: 'all'.", section="Loss"
    )
    normalize: str | None = option(None, "F5: 'std', 'mean', 'leave-one-out'; None: std, dr_grpo's mean.")
    advantage_eps: float = option(1e-6, "F5: added to the standard deviation.")
    reduction: str | None = option(None, "'token-mean' or 'sequence-mean' over the step; None: the objective's.")

    def check_loss(self) -> None:
        super().check_loss()
        settle_means(self)
        checks.one_of("normalize", self.normalize, self.NORMALIZATIONS)
        checks.not_negative("advantage_eps", self.advantage_eps, "the paper uses 1e-6")
        checks.one_of("reduction", self.reduction, MEAN_REDUCTIONS)


def settle_means(config: Any) -> None:
    """Fill in what the objective normalises by and is a mean of, where that is left to it."""
    objective = getattr(config, "objective", "gft")
    config.normalize = config.normalize or ("mean" if objective == "dr_grpo" else "std")
    config.reduction = config.reduction or PRESETS[objective].reduction


def order_liger(config: Any) -> None:
    """Keep Liger's kernels and leave out its loss, which would take the place of the model's forward and so of GFT's.

    Raises ValueError where that loss is asked for by name.
    """
    if not getattr(config, "use_liger_kernel", False):
        return
    chosen = dict(config.liger_kernel_config or {})
    if chosen.get("fused_linear_cross_entropy"):
        raise ValueError(
            "liger_kernel_config must leave fused_linear_cross_entropy out, got True; the GFT loss is in its place."
        )
    config.liger_kernel_config = {**chosen, "fused_linear_cross_entropy": False}
