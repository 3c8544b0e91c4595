"""The one contract between the rooms: a call as every backend sees it, and what a backend hands back.

Sizes: S responses, T positions per padded response, R = S·T rows (packed: S = 1, T = R in shapes), V vocabulary.
Suffixes name shapes: logits_STV, targets_R, rewards_S.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

RECTIFY = ("all", "positive")
REDUCTIONS = ("token-mean", "sequence-mean", "sum", "none")
NORMALIZE = ("std", "mean", "leave-one-out")
SINGLETON = ("reward", "zero")
BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")

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
    rewards_S: Tensor | None = None  # (S,) float32
    advantages_S: Tensor | None = None  # (S,) float32
    advantages_R: Tensor | None = None  # (R,) float32
    weights_R: Tensor | None = None  # (R,) float32: decided already; the loss is then the sum of w·loss
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


@dataclass(frozen=True)
class RowCall:
    """One loss over logits: what `Backend.run` takes."""

    logits_STV: Tensor  # float32, bfloat16 or float16; any strides
    credit: Credit
    tau: float = 0.7
    rectify: str = "all"
    logit_scale: float = 1.0
    softcap: float = 0.0  # 0: none
    temperature: float = 1.0
    want_gradient: bool = False
    inplace: bool = False  # the gradient is written where the logits are
    want_stats: bool = False  # live rows with A = 0 are read as well, for their log-probabilities
    want_entropy: bool = False
    defer_scale: bool = False  # fp16: store the gradient at FP16_PEAK and hand back row_scale_R
    process_group: str = ""  # name of the group whose ranks hold the vocabulary's shards; "": all of V is here


@dataclass(frozen=True)
class RowResult:
    """What `Backend.run` hands back. Per-row tensors are float32 of shape (R,)."""

    loss: Tensor  # () float32; (R,) for reduction "none"
    log_probs_R: Tensor  # F3; 0 on rows that were not read
    coefficients_R: Tensor  # F4; 0 on rows that were not read
    advantages_R: Tensor  # F5; 0 on masked rows
    gradient_STV: Tensor | None = None  # in the logits' dtype; times row_scale_R where that is given
    row_scale_R: Tensor | None = None
    entropy_R: Tensor | None = None


@dataclass(frozen=True)
class TokenStats:
    """Detached per-token statistics, each of the shape of `targets` (float32).

    log_probs: log pi of the target, in nats (F3). coefficients: C(pi) (F4). advantages: A (F5).
    entropy: of the distribution the loss sees, in nats; None unless asked for. Masked positions hold 0.
    """

    log_probs: Tensor
    coefficients: Tensor
    advantages: Tensor
    entropy: Tensor | None = None
