"""slime: `--loss-type custom_loss --custom-loss-function-path gft_kernels.integrations.slime.gft_loss_function`.

slime computes the log-probabilities over its tensor- and context-parallel ranks, holds the advantages and sums up; what
is added is C(pi), F4. `gft_tau` and `gft_rectify` come from the file of `--custom-config-path`.

Sizes: T tokens of all responses of the micro-batch, on this rank; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gft_kernels import checks
from gft_kernels.integrations.given_log_probs import token_losses

# Arguments of slime that its own loss would obey and this one does not.
_UNREAD = {
    "use_tis": "there is no ratio to correct",
    "get_mismatch_metrics": "there is no ratio to correct",
    "use_opsm": "there is no ratio to mask by",
    "use_kl_loss": "no penalty is added",
    "entropy_coef": "no bonus is added",
    "custom_pg_loss_reducer_function_path": "the sum is slime's own",
}


def gft_loss_function(
    args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The GFT loss of a micro-batch and what slime logs of it.

    logits: (1, tokens, V), float32. batch: slime's, with `advantages`, a tensor per response. The denominator is
    slime's: the tokens of the step with --calculate-per-token-loss, else a mean per response.
    Raises: ValueError naming an argument of slime's that would be ignored. Source: arXiv 2604.14258.
    """
    from slime.backends.megatron_utils.loss import get_log_probs_and_entropy, get_rollout_top_p_logprob_kwargs

    for name, reason in _UNREAD.items():
        if getattr(args, name, None):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be left out with GFT, got {getattr(args, name)!r}; {reason}.")
    tau, rectify = getattr(args, "gft_tau", 0.7), getattr(args, "gft_rectify", "all")
    checks.check_coefficient(tau, rectify)
    _, found = get_log_probs_and_entropy(
        logits,
        args=args,
        **{name: batch[name] for name in ("unconcat_tokens", "total_lengths", "response_lengths")},
        with_entropy=False,
        **get_rollout_top_p_logprob_kwargs(args, batch),
    )
    log_probs_T, advantages_T = torch.cat(found["log_probs"]), torch.cat(batch["advantages"])
    tokens = token_losses(log_probs_T, advantages_T, torch.ones_like(log_probs_T, dtype=torch.bool), tau, rectify)
    loss = sum_of_sample_mean(tokens.losses_ST)
    if not log_probs_T.numel():
        loss = loss + 0 * logits.sum()  # the ranks of a context wait for each other in backward
    with torch.no_grad():
        logged = {
            "loss": loss.detach().clone(),
            "pi": sum_of_sample_mean(tokens.log_probs_ST.exp()),
            "rectified": sum_of_sample_mean(tokens.rectified_ST.float()),
        }
    return loss, logged
