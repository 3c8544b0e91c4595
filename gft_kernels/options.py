"""The one contract between the rooms: a call as every backend sees it, and what a backend hands back.

Sizes: S responses, T positions per padded response, R = S·T rows (packed: S = 1, T = R in shapes), D hidden size,
V vocabulary (of this rank's shard, where it is sharded). Suffixes name shapes: logits_STV, targets_R, rewards_S.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gft_kernels.large_pages import in_large_pages

RECTIFY = ("all", "positive")  # of a rule; what a caller may ask for is made of them (objectives.RECTIFIES)
REDUCTIONS = ("token-mean", "sequence-mean", "sum", "none")
NORMALIZE = ("std", "mean", "leave-one-out")
BATCH = "batch"  # of trainers, which know every reward of a step: R - mean of the group, over the deviation of all
SPLIT = "split"  # of group_advantages and the trainer, which know what was given; a loss is told advantages
SINGLETON = ("reward", "zero")
BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
SURROGATES = ("gft", "grpo", "cispo", "sapo", "luffy", "chord", "eaft")  # what kappa and the loss are of

SEQUENCE_RATIOS = ("mean", "geometric")  # how a response's ratio is made of its tokens' (sequences.py)

FP16_PEAK = 16384.0
"""The size an fp16 gradient row is stored at before its row scale; half the range is left free."""


class BackendUnavailable(RuntimeError):
    """A backend asked for by name cannot serve this call on this machine; the message says why."""


@dataclass(frozen=True)
class Credit:
    """Everything that decides a row's advantage A[r] and weight w[r]: targets, rewards, groups, reduction. No logits.

    All tensors are contiguous and on the logits' device. At most one of `rewards_S`, `advantages_S` and
    `advantages_R` is given; with none of them A = 1.
    """

    targets_R: Tensor  # (R,) int64
    mask_R: Tensor | None = None  # (R,) bool
    rewards_S: Tensor | None = None  # (S,) float64: 1e8 + 1 is a reward, and no float32
    advantages_S: Tensor | None = None  # (S,) float32
    advantages_R: Tensor | None = None  # (R,) float32
    weights_R: Tensor | None = None  # (R,) float32: multiplied into the reduction's weight; 0: the row is out
    group_size: int = 0  # consecutive responses per group; 0: group_ids_S decide
    group_ids_S: Tensor | None = None  # (S,) int64
    sequence_ids_R: Tensor | None = None  # (R,) int64: the response of a row; None: r // tokens_per_response
    tokens_per_response: int = 1
    num_items: Tensor | None = None  # () float32: the denominator; None: counted from the live rows
    reduction: str = "token-mean"
    ignore_index: int = -100
    normalize: str = "std"
    eps: float = 1e-6
    singleton: str = "reward"

    @property
    def live_R(self) -> Tensor:
        """Which rows count: the target is not `ignore_index` and the mask, if any, allows it."""
        live_R = self.targets_R != self.ignore_index
        return live_R if self.mask_R is None else live_R & self.mask_R

    @property
    def responses(self) -> int:
        """S: as many as there are rewards or advantages; without them, no response has an id of R or more."""
        per_response = self.rewards_S if self.rewards_S is not None else self.advantages_S
        if per_response is not None:
            return per_response.numel()
        rows = self.targets_R.numel()
        return rows if self.sequence_ids_R is not None else -(-rows // max(self.tokens_per_response, 1))

    @property
    def responses_R(self) -> Tensor:
        """The response that each row belongs to, (R,) int64; S where its id names none."""
        if self.sequence_ids_R is not None:
            inside_R = (self.sequence_ids_R >= 0) & (self.sequence_ids_R < self.responses)
            return torch.where(inside_R, self.sequence_ids_R, self.responses)
        rows = self.targets_R
        return torch.arange(rows.numel(), device=rows.device) // max(self.tokens_per_response, 1)


def on_rows(values_S: Tensor, sequence_ids_R: Tensor | None, tokens_per_response: int, outside: float | bool) -> Tensor:
    """(R,) of memory of its own: each row's response's value; `outside` where a row's id names no response."""
    if sequence_ids_R is None:
        return values_S.repeat_interleave(tokens_per_response)
    if values_S.numel() == 0:
        return torch.full(sequence_ids_R.shape, outside, dtype=values_S.dtype, device=values_S.device)
    inside_R = (sequence_ids_R >= 0) & (sequence_ids_R < values_S.numel())
    return torch.where(inside_R, values_S[sequence_ids_R.clamp(0, values_S.numel() - 1)], outside)


@dataclass(frozen=True)
class Rule:
    """What tells one surrogate from another: how kappa and the loss follow from log pi and A (surrogates.py).

    A field that the surrogate does not use is not read.
    """

    surrogate: str = "gft"
    tau: float = 0.7  # gft: F4
    rectify: str = "all"
    clip_low: float = 0.0  # grpo: rho below 1 - clip_low is clipped where A < 0; cispo: the floor of rho
    clip_high: float = 0.0  # grpo: rho above 1 + clip_high where A > 0; cispo: the cap of rho
    delta: float = math.inf  # grpo: rho above it is held there where A < 0 (dual clip); inf: no such bound
    gamma: float = 0.0  # luffy, and gft where it does not rectify: of pi / (pi + gamma)
    gate_positive: float = 1.0  # sapo: how steep its gate is where A > 0
    gate_negative: float = 1.0  # and elsewhere
    entropy_power: float = 1.0  # eaft


RULE_FIELDS = tuple(each.name for each in fields(Rule))
rule_values = attrgetter(*RULE_FIELDS)


@dataclass(frozen=True)
class Objective(Rule):
    """The objective of a call: its rule, perhaps another for the rows that are given, and the penalties of all.

    Sections 4 and 8 of docs/formulas.md. No logits. Tensors are contiguous and on the logits' device; masked rows may
    hold NaN.
    """

    over_sequence: str = ""  # one of SEQUENCE_RATIOS: rho is a response's, and no backend sees it yet; "": a token's
    given: Rule = field(default_factory=Rule)  # not one for all: PyTorch 2.11 does not trace an object as a default
    given_R: Tensor | None = None  # (R,) bool: the rows under the rule `given`; None: none
    beta: float = 0.0  # weight of the KL penalty
    entropy_coef: float = 0.0  # lambda of -lambda·H
    kl_cap: float = math.inf  # beyond this log(pi_ref / pi), in nats, the penalty goes on in a straight line
    kl_estimator: int = 3  # of the penalty: 1, 2, 3 are k1, k2, k3
    old_log_probs_R: Tensor | None = None  # (R,) float32, of rho; None: on-policy, rho = 1
    ref_log_probs_R: Tensor | None = None  # (R,) float32, of the KL; given where beta is not 0

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Those that some row may be under."""
        return (self,) if self.given_R is None else (self, self.given)

    @property
    def acts_without_advantage(self) -> bool:
        """Whether a live row with A = 0 still has a loss and a gradient."""
        return self.beta != 0.0 or self.entropy_coef != 0.0

    @property
    def needs_entropy(self) -> bool:
        return self.entropy_coef != 0.0 or any(rule.surrogate == "eaft" for rule in self.rules)

    def of_rows(self, rows: Tensor | slice) -> Objective:
        """The same objective for some of the rows."""
        per_row: dict[str, Any] = {name: value[rows] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **per_row) if per_row else self


@dataclass(frozen=True)
class RowCall:
    """One loss over logits: what `Backend.run` takes."""

    logits_STV: Tensor  # float32, bfloat16 or float16; any strides
    credit: Credit
    objective: Objective = field(default_factory=Objective)
    logit_scale: float = 1.0
    softcap: float = 0.0  # 0: none
    temperature: float = 1.0
    want_gradient: bool = False
    inplace: bool = False  # the gradient is written where the logits are
    gradient_dtype: torch.dtype | None = None  # a half-precision one, of float32 logits; None: the logits'
    want_stats: bool = False  # live rows with A = 0 are read as well, for their log-probabilities
    want_entropy: bool = False
    defer_scale: bool = False  # fp16: store the gradient at FP16_PEAK and hand back row_scale_R
    process_group: str = ""  # name of the group whose ranks hold the vocabulary's shards; "": all of V is here

    @property
    def reads_every_live_row(self) -> bool:
        """Whether rows the loss has no use for are read as well, for their statistics."""
        return self.want_stats or self.want_entropy

    @property
    def needs_entropy(self) -> bool:
        """Whether H is needed, for the caller or for the loss."""
        return self.want_entropy or self.objective.needs_entropy


@dataclass(frozen=True)
class LinearCall:
    """One loss over hidden states and an output head: logits = hidden @ weight^T + bias, never all at once."""

    hidden_STD: Tensor  # float32, bfloat16 or float16; any strides
    weight_VD: Tensor  # one of the same dtypes
    bias_V: Tensor | None
    credit: Credit
    objective: Objective = field(default_factory=Objective)
    logit_scale: float = 1.0  # this and the next five as in RowCall
    softcap: float = 0.0
    temperature: float = 1.0
    want_stats: bool = False
    want_entropy: bool = False
    process_group: str = ""
    chunk_rows: int = 0  # rows of logits held at a time; 0: linear.chunks decides
    product_dtype: torch.dtype = torch.float32  # what hidden and weight are rounded to before they are multiplied
    logits_dtype: torch.dtype = torch.float32
    accum_dtype: torch.dtype = torch.float32  # of the gradients' sums
    filter_eps: float = 0.0  # share of the logits' gradient, in norm, that the products may leave out; 0: none
    want_hidden: bool = False  # which gradients: a product each
    want_weight: bool = False
    want_bias: bool = False
    upstream_R: Tensor | None = None  # (R,) float32: multiplied into the weights, where backward brings it

    @property
    def want_gradient(self) -> bool:
        return self.want_hidden or self.want_weight or self.want_bias


def gradient_for(logits: Tensor, inplace: bool, dtype: torch.dtype | None = None) -> Tensor:
    """Where a gradient of the logits goes, in their dtype or a narrower one: contiguous memory, uninitialised, or their
    own. There a narrower one takes the first part of each row's."""
    if not inplace:
        return in_large_pages(torch.empty_like(logits, dtype=dtype, memory_format=torch.contiguous_format))
    return logits if dtype in (None, logits.dtype) else logits.view(dtype)[..., : logits.shape[-1]]


class ShardStatistics(NamedTuple):
    """A vocabulary shard's part of each row; (R,), in nats. The state leaves the target out, as F3 wants it."""

    top_R: Tensor  # at most 50 below the shard's largest logit; -inf on rows that were not read
    mass_R: Tensor  # sum of e^(z - top)
    gap_R: Tensor | None  # sum of e^(z - top)·(z - top), for the entropy
    target_logit_R: Tensor  # transformed; 0 where the target lies in another shard


class AgreedRows(NamedTuple):
    """What the ranks of a sharded vocabulary agreed on about each whole row; float32 (R,), in nats."""

    log_pi_R: Tensor
    top_R: Tensor
    log_mass_R: Tensor
    scale_R: Tensor  # weight·kappa
    tilt_R: Tensor  # weight·lambda; where it and scale are 0 the gradient is exactly 0
    entropy_R: Tensor  # used where tilt is not 0


@dataclass(frozen=True)
class RowResult:
    """What `Backend.run` hands back. Per-row tensors are float32 of shape (R,)."""

    loss: Tensor  # () float32; (R,) for reduction "none"
    log_probs_R: Tensor  # F3; 0 on rows that were not read
    coefficients_R: Tensor  # kappa / A without the penalties (F4); 0 on rows that were not read
    advantages_R: Tensor  # F5; 0 on masked rows
    gradient_STV: Tensor | None = None  # in the dtype asked for; times row_scale_R where that is given
    row_scale_R: Tensor | None = None
    entropy_R: Tensor | None = None
    kept_R: Tensor | None = None  # of a linear loss under filter_eps: as LinearResult's


@dataclass(frozen=True)
class LinearResult:
    """Per-row tensors are float32 (R,); gradients are in accum_dtype, not yet times the upstream gradient, or None."""

    loss: Tensor  # () float32; (R,) for reduction "none"
    log_probs_R: Tensor
    coefficients_R: Tensor
    advantages_R: Tensor
    entropy_R: Tensor | None
    kept_R: Tensor | None  # share of this rank's columns the gradients' products took; 0 where no gradient was wanted
    hidden_gradient_RD: Tensor | None
    weight_gradient_VD: Tensor | None
    bias_gradient_V: Tensor | None
    unit: Tensor | None  # () float32 the gradients must still be multiplied by; None: 1


@dataclass(frozen=True)
class TokenStats:
    """Detached per-token statistics, each of the shape of `targets` (float32). Masked positions hold 0.

    log_probs: log pi of the target, in nats (F3). coefficients: C(pi) (F4); of other objectives kappa / A without the
    penalties, 0 where a clip is active. advantages: A (F5). entropy: of the distribution the loss sees, in nats; None
    unless asked for.

    `policy_loss` adds, where there is such a thing: ratios, pi / pi_old. clipped (bool): the ratio is beyond its bound.
    kl: the estimate of KL(pi, pi_ref), in nats: k3 where no other is asked for.

    kept: under `filter_eps`, the share of the vocabulary (of this rank's, where it is sharded) that the two backward
    products of a row took in full, 0 for a row without a gradient; None where nothing is left out, or not yet.
    """

    log_probs: Tensor
    coefficients: Tensor
    advantages: Tensor
    entropy: Tensor | None = None
    ratios: Tensor | None = None
    clipped: Tensor | None = None
    kl: Tensor | None = None
    kept: Tensor | None = None
