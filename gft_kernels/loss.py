"""`gft_loss` and `GFTLoss`: the loss over logits."""

from __future__ import annotations

import torch
from torch import Tensor

from gft_kernels import checks
from gft_kernels.operators.row import row_loss
from gft_kernels.options import RowResult, TokenStats


def gft_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    rewards: Tensor | None = None,
    advantages: Tensor | None = None,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    mask: Tensor | None = None,
    tau: float = 0.7,
    rectify: str = "all",
    temperature: float = 1.0,
    softcap: float | None = None,
    reduction: str = "token-mean",
    num_items_in_batch: float | Tensor | None = None,
    ignore_index: int = -100,
    normalize: str = "std",
    eps: float = 1e-6,
    singleton: str = "reward",
    inplace: bool = False,
    return_stats: bool = False,
    return_entropy: bool = False,
    process_group: torch.distributed.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, TokenStats]:
    """The GFT loss, -A·C(pi)·log pi per token (F6), with its gradient computed in the same pass.

    Sizes: S responses, T positions, V vocabulary; packed: R rows. A row is live if its target is not `ignore_index`
    and `mask` allows it. Rows that are masked, or whose advantage is 0, cost nothing and have gradient exactly 0.

    Args:
        logits: (S, T, V) padded or (R, V) packed; float32, bfloat16 or float16; any strides.
        targets: (S, T) or (R,) int64 or int32; row r of the logits predicts targets[r] (shift before you call).
        rewards: (S,) one per response; standardised within each group into advantages (F5). Needs groups.
        advantages: instead of rewards: one per response (S,), or per row (S, T) or (R,). Neither: A = 1. For packed
            rows, (S,) needs `sequence_ids`; a length equal to R is always read as one per row.
        group_size: number of consecutive responses that share a prompt.
        group_ids: (S,) integers instead of group_size: equal ids share a prompt, in any order.
        sequence_ids: (R,) for packed rows: the response, 0 to S - 1, a row belongs to.
        mask: bool, shape of targets: False takes a row out of the loss.
        tau: threshold in [0, 1] of the coefficient (F4): C = pi if pi < tau else 1. 0 is SFT, 1 is DFT (with A = 1).
        rectify: "all" (the paper) or "positive": C only where A > 0, which keeps the full push away from bad tokens.
        temperature: divides the logits, for pi and log pi alike.
        softcap: c of z <- c·tanh(z / c), before the temperature; None: none.
        reduction: "token-mean" (sum / live rows), "sequence-mean" (mean over responses of their token means), "sum",
            or "none" (one loss per row).
        num_items_in_batch: the denominator of the means, if this call sees only a part of the batch: tokens for
            "token-mean", responses for "sequence-mean".
        ignore_index: the target value of rows that do not count.
        normalize: "std" (the paper), "mean" (no division) or "leave-one-out" (unbiased for on-policy groups).
        eps: added to the group's standard deviation.
        singleton: the advantage of a group of one: its "reward", or "zero".
        inplace: write the gradient where the logits are: no logits-sized memory is taken, and the logits are gone
            after the call. The graph can then be walked backward once. Without a gradient to compute, no effect.
        return_stats: also return `TokenStats`; live rows with A = 0 are then read for their log-probabilities.
        return_entropy: also return `TokenStats`, with each row's entropy.
        process_group: the logits are sharded over V in rank order; targets are global ids.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        A float32 scalar (for "none": float32, shape of targets), or (loss, TokenStats).

    Raises:
        ValueError, TypeError: an argument is wrong; the sentence names it. Targets out of range are found on the CPU;
            on a GPU they give NaN in their row.
        BackendUnavailable: the named backend cannot serve this call.

    Source: docs/formulas.md; GFT, arXiv 2604.14258.
    """
    call = checks.row_call(
        logits,
        targets,
        rewards=rewards,
        advantages=advantages,
        group_size=group_size,
        group_ids=group_ids,
        sequence_ids=sequence_ids,
        mask=mask,
        objective=checks.gft_objective(tau, rectify),
        temperature=temperature,
        softcap=softcap,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
        ignore_index=ignore_index,
        normalize=normalize,
        eps=eps,
        singleton=singleton,
        inplace=inplace,
        return_stats=return_stats,
        return_entropy=return_entropy,
        backend=backend,
        process_group=process_group,
    )
    result = row_loss(call, backend)
    return as_asked(result, targets.shape, reduction, return_stats or return_entropy)


def as_asked(
    result: RowResult, shape: torch.Size, reduction: str, want_stats: bool
) -> Tensor | tuple[Tensor, TokenStats]:
    """The loss, alone or with its statistics, in the shape of the targets where it is per row."""
    loss = result.loss.reshape(shape) if reduction == "none" else result.loss
    if not want_stats:
        return loss
    entropy = None if result.entropy_R is None else result.entropy_R.reshape(shape)
    log_probs, coefficients = result.log_probs_R.reshape(shape), result.coefficients_R.reshape(shape)
    return loss, TokenStats(log_probs, coefficients, result.advantages_R.reshape(shape), entropy)


class GFTLoss(torch.nn.Module):
    """`gft_loss` with its options fixed: `GFTLoss(tau=0.5, group_size=8)(logits, targets, rewards=rewards)`."""

    def __init__(self, **options):
        super().__init__()
        checks.known_options(gft_loss, options)
        self.options = options

    def forward(self, logits: Tensor, targets: Tensor, **tensors) -> Tensor | tuple[Tensor, TokenStats]:
        return gft_loss(logits, targets, **{**self.options, **tensors})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
