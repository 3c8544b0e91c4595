"""SkyRL: `register()` before its entry point, then `trainer.algorithm.policy_loss_type=gft`.

SkyRL computes the log-probabilities, holds the advantages and has scaled them by `loss_reduction`, so that a sum over
tokens is the mean it was asked for; what is added is C(pi), F4, which no scale of A changes.

Sizes: S responses, T tokens of the padded response.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gft_kernels import checks
from gft_kernels.integrations.given_log_probs import token_losses

NAME = "gft"


def register(tau: float = 0.7, rectify: str = "all") -> None:
    """Put the GFT loss into SkyRL's registry of policy losses under the name `gft`.

    Raises: ValueError, TypeError for tau or rectify. Source: arXiv 2604.14258.
    """
    from skyrl.backends.skyrl_train.utils.off_policy_correction_utils import apply_off_policy_correction
    from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry

    checks.check_coefficient(tau, rectify)

    def gft_policy_loss(
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        config: Any,
        loss_mask: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        mask_ST = torch.ones_like(log_probs) if loss_mask is None else loss_mask
        found = token_losses(log_probs, advantages, mask_ST != 0, tau, rectify)
        losses_ST, mask_ST, metrics = apply_off_policy_correction(
            found.losses_ST, old_log_probs, rollout_logprobs, mask_ST, config.off_policy_correction
        )
        live_ST = mask_ST != 0  # the correction may have taken tokens out
        rectified = (found.rectified_ST & live_ST).sum() / live_ST.sum().clamp(min=1)
        return (losses_ST * mask_ST).sum(), {"clip_ratio": rectified.item(), **metrics}

    PolicyLossRegistry.register(NAME, gft_policy_loss)
