"""The public losses and their modules. One function has everything, `policy_loss`; the others are short names for it.

Their options stand in arguments.py, once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gft_kernels import calls, objectives
from gft_kernels.advantages import RowCredit, rows_read
from gft_kernels.arguments import LinearOptions, LogProbOptions, PolicyOptions, RowOptions, completed, takes
from gft_kernels.operators.linear import linear_loss
from gft_kernels.operators.row import row_loss
from gft_kernels.options import LinearCall, RowCall, RowResult, TokenStats

if TYPE_CHECKING:
    from typing_extensions import Unpack

_GFT = {"tau": 0.7, "rectify": "all", "reduction": "token-mean"}
_FLOAT32 = {"logits_dtype": torch.float32}


@takes(RowOptions, **_GFT)
def gft_loss(logits: Tensor, targets: Tensor, **options: Unpack[RowOptions]) -> Tensor | tuple[Tensor, TokenStats]:
    """The GFT loss, -A·C(pi)·log pi per token (F6), with its gradient computed in the same pass.

    Sizes: S responses, T positions, V vocabulary; packed: R rows. A row is live if its target is not `ignore_index`
    and `mask` allows it. Rows that are masked, or of advantage or weight 0, cost nothing and have gradient exactly 0.
    There is one derivative, the first, in reverse mode; asking for another raises, but for a second one of a
    loss that torch.compile compiled with its backward: there it is 0, as of every constant a compiled graph keeps.

    Args:
        logits: (S, T, V) padded or (R, V) packed; float32, bfloat16 or float16; any strides.
        targets: (S, T) or (R,) int64 or int32; row r of the logits predicts targets[r] (shift before you call).

    Returns:
        A float32 scalar (for reduction "none": float32, shape of targets), or (loss, TokenStats).

    Raises:
        ValueError, TypeError: an argument is wrong; the sentence names it. On the CPU also for targets out of range
            and live numbers that are not finite; on a GPU those give NaN in their row.
        BackendUnavailable: the named backend cannot serve this call.

    Source: docs/formulas.md; GFT, arXiv 2604.14258.
    """
    return _loss("logits", logits, targets, completed(gft_loss, options))


@takes(LinearOptions, **_GFT, **_FLOAT32, accum_dtype=torch.float32)
def gft_linear_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, **options: Unpack[LinearOptions]
) -> Tensor | tuple[Tensor, TokenStats]:
    """The GFT loss of logits = hidden @ weight^T + bias, which are never all in memory (F6, F7).

    Equal to `gft_loss` on those logits, but holds a chunk of rows at a time, and rows that cannot matter (masked, or
    of advantage 0) leave before the first product. Gradients of hidden, weight and bias are ready with the loss:
    three matrix products in all, fewer where one of them needs no gradient. Waits for a GPU once, to learn how many
    rows are left. Sizes: S responses, T positions, D hidden size, V vocabulary; packed: R rows.

    Args:
        hidden: (S, T, D) padded or (R, D) packed; float32, bfloat16 or float16; any strides.
        weight: (V, D), the output head; the dtype of hidden, or any of the three under autocast.
        targets: (S, T) or (R,) int64 or int32; row r of hidden predicts targets[r] (shift before you call).

    Returns:
        As `gft_loss`.

    Raises:
        ValueError, TypeError: as `gft_loss`, and for heads that are not plain tensors: modules with adapters,
            DTensors, ZeRO-3 parameters that are elsewhere, quantised weights.
        BackendUnavailable: the named backend cannot serve the rows.

    Source: docs/linear.md; docs/formulas.md; GFT, arXiv 2604.14258.
    """
    given: PolicyOptions = {**completed(gft_linear_loss, options), "weight": weight}
    return _loss("hidden", hidden, targets, given, over_head=True)


@takes(PolicyOptions)
def policy_loss(
    inputs: Tensor, targets: Tensor, **options: Unpack[PolicyOptions]
) -> Tensor | tuple[Tensor, TokenStats]:
    """GFT or another objective of its family by name, or two; with a KL penalty and an entropy bonus if asked for.

    All have the gradient of `gft_loss` with another number per row, so they run on the same kernels; with `weight` the
    logits never exist all at once, as in `gft_linear_loss`. The loss is the surrogate's own value. Rows that are
    masked, of weight 0, or whose advantage is 0 while beta and entropy_coef are 0, are not read and have gradient
    exactly 0; what else a masked row holds (NaN in old_log_probs, say) does not matter. An option that an objective
    does not use is refused.
    Sizes: S responses, T positions, V vocabulary, D hidden size; packed: R rows.

    Args:
        inputs: the logits, (S, T, V) or packed (R, V); with `weight` the hidden states, (S, T, D) or (R, D).
        targets: (S, T) or (R,) int64 or int32; row r of the inputs predicts targets[r] (shift before you call).

    Returns:
        As `gft_loss`; the `TokenStats` have ratios, clipped and kl where the objective has them.

    Raises:
        ValueError, TypeError: an argument is wrong or not the objective's; the sentence names it.
        BackendUnavailable: the named backend cannot serve this call.

    Source: docs/objectives.md, with the paper of each; docs/formulas.md; GFT, arXiv 2604.14258.
    """
    given = completed(policy_loss, options)
    return _loss("inputs", inputs, targets, given, over_head=given["weight"] is not None)


@takes(LogProbOptions, **_FLOAT32)
@torch.no_grad()
def token_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, **options: Unpack[LogProbOptions]
) -> Tensor | tuple[Tensor, Tensor]:
    """log pi of each target (F3) without gradients, for a reference or an old policy; same chunks, one product.

    Args:
        hidden, weight, targets: as in `gft_linear_loss`.

    Returns:
        float32 of the shape of targets, in nats, 0 on rows that are masked; with `return_entropy` also each row's
        entropy in nats.

    Raises:
        As `gft_linear_loss`.

    Source: docs/linear.md.
    """
    given = completed(token_log_probs, options)
    asked: PolicyOptions = {**given, "weight": weight, "return_stats": True, "reduction": "sum"}
    _, stats = _loss("hidden", hidden, targets, asked, over_head=True)
    return stats.log_probs if stats.entropy is None else (stats.log_probs, stats.entropy)


def _loss(
    name: str, inputs: Tensor, targets: Tensor, given: PolicyOptions, over_head: bool = False
) -> Tensor | tuple[Tensor, TokenStats]:
    """Arguments to a call, the call through its operator, and what was asked for back. name: of `inputs`."""
    objective, reduction = objectives.resolve(given, targets)
    call: RowCall | LinearCall
    if over_head:
        call = calls.linear_call(name, inputs, targets, objective, reduction, given)
        result = linear_loss(call, given["backend"])
    else:
        call = calls.row_call(name, inputs, targets, objective, reduction, given)
        result = row_loss(call, given["backend"])
    loss = _of_rows_read(result, call).reshape(targets.shape) if reduction == "none" else result.loss
    if not (given["return_stats"] or given["return_entropy"]):
        return loss
    return loss, _stats(result, call, targets.shape)


def _of_rows_read(result: RowResult, call: RowCall | LinearCall) -> Tensor:
    """The rows' losses. Rows that are not read leave the graph here: no upstream makes 0·inf of their gradient."""
    live_R, weights_R = call.credit.live_R, call.credit.weights_R
    credit = RowCredit(live_R, result.advantages_R, live_R if weights_R is None else weights_R)
    return torch.where(rows_read(credit, call.objective, every=False), result.loss, 0.0)


def _stats(result: RowResult, call: RowCall | LinearCall, shape: torch.Size) -> TokenStats:
    """A result's statistics in the shape of the targets."""
    entropy = None if result.entropy_R is None else result.entropy_R.reshape(shape)
    log_probs, coefficients = result.log_probs_R.reshape(shape), result.coefficients_R.reshape(shape)
    advantages = result.advantages_R.reshape(shape)
    kept = None if result.kept_R is None else result.kept_R.reshape(shape)
    return TokenStats(log_probs, coefficients, advantages, entropy, kept=kept, **objectives.ratios(result, call, shape))


class _Fixed(torch.nn.Module):
    """A function with its options fixed."""

    def __init__(self, function, options):
        super().__init__()
        completed(function, options)  # refuses a name that it does not know
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class GFTLoss(_Fixed):
    """`gft_loss` with its options fixed: `GFTLoss(tau=0.5, group_size=8)(logits, targets, rewards=rewards)`."""

    def __init__(self, **options: Unpack[RowOptions]):
        super().__init__(gft_loss, options)

    def forward(self, logits: Tensor, targets: Tensor, **options: Unpack[RowOptions]):
        return gft_loss(logits, targets, **{**self.options, **options})


class GFTLinearLoss(_Fixed):
    """`gft_linear_loss` with its options fixed: `GFTLinearLoss(tau=0.5)(hidden, lm_head.weight, targets)`."""

    def __init__(self, **options: Unpack[LinearOptions]):
        super().__init__(gft_linear_loss, options)

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor, **options: Unpack[LinearOptions]):
        return gft_linear_loss(hidden, weight, targets, **{**self.options, **options})
