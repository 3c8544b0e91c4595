"""`policy_loss`: the family of token-level objectives that GFT belongs to, over logits or over hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gft_kernels import checks, formulas, linear_checks, policy_checks
from gft_kernels.linear_call import LinearCall
from gft_kernels.loss import as_asked
from gft_kernels.operators.linear import linear_loss
from gft_kernels.operators.row import row_loss
from gft_kernels.options import RowCall, TokenStats


def policy_loss(
    inputs: Tensor,
    targets: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    objective: str = "gft",
    rewards: Tensor | None = None,
    advantages: Tensor | None = None,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    mask: Tensor | None = None,
    old_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    clip_low: float | None = None,
    clip_high: float | None = None,
    beta: float = 0.0,
    entropy_coef: float = 0.0,
    tau: float | None = None,
    rectify: str | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float | None = None,
    reduction: str | None = None,
    num_items_in_batch: float | Tensor | None = None,
    ignore_index: int = -100,
    normalize: str = "std",
    eps: float = 1e-6,
    singleton: str = "reward",
    inplace: bool = False,
    chunk_rows: int | None = None,
    accum_dtype: torch.dtype | None = None,
    logits_dtype: torch.dtype | None = None,
    return_stats: bool = False,
    return_entropy: bool = False,
    process_group: torch.distributed.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, TokenStats]:
    """GFT, SFT, DFT, GRPO, DAPO, Dr. GRPO or CISPO by name, with a KL penalty and an entropy bonus if asked for.

    All have the gradient of `gft_loss` with another number per row, so they run on the same kernels; with `weight` the
    logits never exist all at once, as in `gft_linear_loss`. The loss is the surrogate's own value. Rows that are
    masked, or whose advantage is 0 while beta and entropy_coef are 0, are not read and have gradient exactly 0; what
    else a masked row holds (NaN in old_log_probs, say) does not matter. An option that an objective does not use is
    refused.
    Sizes: S responses, T positions, V vocabulary, D hidden size; packed: R rows.

    Args:
        inputs: the logits, (S, T, V) or packed (R, V); with `weight` the hidden states, (S, T, D) or (R, D).
        targets: (S, T) or (R,) int64 or int32; row r of the inputs predicts targets[r] (shift before you call).
        weight: (V, D), the output head; None: inputs are logits.
        bias: (V,) added to the logits; needs weight.
        objective: "gft", "sft", "dft", "grpo", "dapo", "dr_grpo" or "cispo".
        rewards, advantages, group_size, group_ids, sequence_ids, mask: as in `gft_loss`; sft and dft take neither
            rewards nor advantages.
        old_log_probs: log pi_old of each target, shape of targets, in nats, detached; for the ratio rho = pi / pi_old
            of grpo, dapo, dr_grpo and cispo. None: on-policy, rho = 1, while its gradient still flows.
        ref_log_probs: log pi_ref of each target, likewise; for beta, or for the kl of the statistics.
        clip_low, clip_high: the clip range of rho, [1 - clip_low, 1 + clip_high]; of grpo 0.2 and 0.2, of dapo 0.2 and
            0.28, of dr_grpo 0.2 and 0.2. cispo caps rho at 1 + clip_high, 5 by default, and has no lower bound.
        beta: weight of the k3 estimate of KL(pi, pi_ref) added to each token's loss.
        entropy_coef: lambda; each token's loss has -lambda·H added, H the entropy of its whole distribution in nats.
        tau: of gft, as in `gft_loss`; None: 0.7.
        rectify: of gft, as in `gft_loss`; None: "all".
        temperature, softcap, logit_scale, ignore_index, normalize, eps, singleton, return_entropy, process_group,
            backend: as in `gft_loss` and `gft_linear_loss`.
        reduction: as in `gft_loss`; None: "sequence-mean" for grpo, else "token-mean".
        num_items_in_batch: as in `gft_loss`; dr_grpo has no other denominator, so there it must be given.
        inplace: as in `gft_loss`; not with weight.
        chunk_rows, accum_dtype, logits_dtype: as in `gft_linear_loss`; need weight.
        return_stats: also return `TokenStats`, with ratios, clipped and kl where the objective has them.

    Returns:
        A float32 scalar (for "none": float32, shape of targets), or (loss, TokenStats).

    Raises:
        ValueError, TypeError: an argument is wrong or not the objective's; the sentence names it.
        BackendUnavailable: the named backend cannot serve this call.

    Source: docs/objectives.md; docs/formulas.md; GRPO, arXiv 2402.03300; DAPO, 2503.14476; Dr. GRPO, 2503.20783;
        CISPO, 2506.13585; DFT, 2508.05629; GFT, 2604.14258.
    """
    chosen = policy_checks.objective_of(
        objective,
        {"tau": tau, "rectify": rectify, "clip_low": clip_low, "clip_high": clip_high, "old_log_probs": old_log_probs},
        beta=beta,
        entropy_coef=entropy_coef,
        ref_log_probs=ref_log_probs,
        return_stats=return_stats,
        targets=targets,
    )
    policy_checks.check_credit(objective, advantages, rewards)
    reduction = policy_checks.reduction_of(objective, reduction, num_items_in_batch)
    shared: dict[str, Any] = {
        "rewards": rewards,
        "advantages": advantages,
        "group_size": group_size,
        "group_ids": group_ids,
        "sequence_ids": sequence_ids,
        "mask": mask,
        "objective": chosen,
        "temperature": temperature,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "reduction": reduction,
        "num_items_in_batch": num_items_in_batch,
        "ignore_index": ignore_index,
        "normalize": normalize,
        "eps": eps,
        "singleton": singleton,
        "return_stats": return_stats,
        "return_entropy": return_entropy,
        "process_group": process_group,
        "backend": backend,
    }
    linear: dict[str, Any] = {
        "bias": bias,
        "chunk_rows": chunk_rows,
        "accum_dtype": accum_dtype,
        "logits_dtype": logits_dtype,
    }
    policy_checks.check_path(weight, linear, inplace)
    call: RowCall | LinearCall
    if weight is None:
        call = checks.row_call(inputs, targets, inplace=inplace, **shared)
        result = row_loss(call, backend)
    else:
        for dtype in ("accum_dtype", "logits_dtype"):
            linear[dtype] = linear[dtype] or torch.float32
        call = linear_checks.linear_call(inputs, weight, targets, **linear, **shared)
        result = linear_loss(call, backend)
    found = as_asked(result, targets.shape, reduction, return_stats or return_entropy)
    return found if isinstance(found, Tensor) else (found[0], with_ratios(found[1], call))


def with_ratios(stats: TokenStats, call: RowCall | LinearCall) -> TokenStats:
    """The statistics with ratios, clipped and kl, where the call's objective has them."""
    o, shape, live = call.objective, stats.log_probs.shape, call.credit.live_R.view(stats.log_probs.shape)
    added = {}
    if o.surrogate != "gft":
        old = stats.log_probs if o.old_log_probs_R is None else o.old_log_probs_R.view(shape)
        ratios = torch.exp(formulas.log_ratio(stats.log_probs, old))
        over = ratios > 1.0 + o.clip_high
        if o.surrogate == "grpo":
            over = formulas.is_clipped(ratios, stats.advantages, o.clip_low, o.clip_high, o.delta)
        added = {"ratios": torch.where(live, ratios, 0.0), "clipped": live & over}
    if o.ref_log_probs_R is not None:
        kl = formulas.kl_loss(formulas.log_ratio(o.ref_log_probs_R.view(shape), stats.log_probs), o.kl_cap)
        added["kl"] = torch.where(live, kl, 0.0)
    # not dataclasses.replace, which torch 2.6 cannot trace
    return TokenStats(stats.log_probs, stats.coefficients, stats.advantages, stats.entropy, **added)
