"""`gft_linear_loss`, `GFTLinearLoss` and `token_log_probs`: the loss from hidden states and the output head.

The logits never exist all at once: chunks.py goes over the rows a chunk at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gft_kernels import checks, linear_checks
from gft_kernels.loss import as_asked
from gft_kernels.operators.linear import linear_loss
from gft_kernels.options import TokenStats


def gft_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float | None = None,
    chunk_rows: int | None = None,
    accum_dtype: torch.dtype = torch.float32,
    logits_dtype: torch.dtype = torch.float32,
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
    return_stats: bool = False,
    return_entropy: bool = False,
    process_group: torch.distributed.ProcessGroup | None = None,
    backend: str = "auto",
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
        bias: (V,) added to the logits.
        logit_scale: factor of the logits, before the softcap; None: 1.
        chunk_rows: rows of logits held at a time; None: as docs/linear.md describes.
        accum_dtype: of the sums over chunks that become the gradients; float32, or bfloat16 for bfloat16 products.
        logits_dtype: float32, or bfloat16 for bfloat16 products: half the memory, and logits in steps of 2^-8.
        rewards, advantages, group_size, group_ids, sequence_ids, mask, tau, rectify, temperature, softcap, reduction,
            num_items_in_batch, ignore_index, normalize, eps, singleton, return_stats, return_entropy, backend: as in
            `gft_loss`. With reduction "none" backward computes the logits a second time.
        process_group: weight and bias are this rank's rows of a head sharded over the vocabulary in rank order;
            everything else is the same on all ranks, which all get the same loss and hidden gradient.

    Returns:
        A float32 scalar (for "none": float32, shape of targets), or (loss, TokenStats).

    Raises:
        ValueError, TypeError: an argument is wrong; the sentence names it. Also for heads that are not plain tensors:
            modules with adapters, DTensors, ZeRO-3 parameters that are elsewhere, quantised weights.
        BackendUnavailable: the named backend cannot serve the rows.

    Source: docs/linear.md; docs/formulas.md; GFT, arXiv 2604.14258.
    """
    call = linear_checks.linear_call(
        hidden,
        weight,
        targets,
        bias=bias,
        logit_scale=logit_scale,
        chunk_rows=chunk_rows,
        accum_dtype=accum_dtype,
        logits_dtype=logits_dtype,
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
        return_stats=return_stats,
        return_entropy=return_entropy,
        process_group=process_group,
        backend=backend,
    )
    result = linear_loss(call, backend)
    return as_asked(result, targets.shape, reduction, return_stats or return_entropy)


@torch.no_grad()
def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    chunk_rows: int | None = None,
    logits_dtype: torch.dtype = torch.float32,
    process_group: torch.distributed.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """log pi of each target (F3) without gradients, for a reference or an old policy; same chunks, one product.

    Arguments as in `gft_linear_loss`. Returns: float32 of the shape of targets, in nats, 0 on rows that are masked;
    with `return_entropy` also each row's entropy in nats. Raises: as `gft_linear_loss`.
    """
    _loss, stats = gft_linear_loss(
        hidden,
        weight,
        targets,
        bias=bias,
        logit_scale=logit_scale,
        temperature=temperature,
        softcap=softcap,
        mask=mask,
        ignore_index=ignore_index,
        return_stats=True,
        return_entropy=return_entropy,
        chunk_rows=chunk_rows,
        logits_dtype=logits_dtype,
        process_group=process_group,
        backend=backend,
        reduction="sum",
    )
    return stats.log_probs if stats.entropy is None else (stats.log_probs, stats.entropy)


class GFTLinearLoss(torch.nn.Module):
    """`gft_linear_loss` with its options fixed: `GFTLinearLoss(tau=0.5)(hidden, lm_head.weight, targets)`."""

    def __init__(self, **options):
        super().__init__()
        checks.known_options(gft_linear_loss, options)
        self.options = options

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor, **tensors) -> Tensor | tuple[Tensor, TokenStats]:
        return gft_linear_loss(hidden, weight, targets, **{**self.options, **tensors})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
