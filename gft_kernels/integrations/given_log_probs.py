"""The GFT loss where a trainer computes the log-probabilities itself and hands over nothing else of the logits.

Sizes: S responses, T tokens of the padded response.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gft_kernels import formulas


class TokenLosses(NamedTuple):
    """Of shape (S, T), 0 where a token does not count; only the losses carry a gradient."""

    losses_ST: Tensor
    log_probs_ST: Tensor
    rectified_ST: Tensor  # bool: C(pi) < 1

    def means(self, live_ST: Tensor) -> dict[str, Tensor]:
        """Mean pi, and the share of tokens with C(pi) < 1, of those that count."""
        tokens = live_ST.sum().clamp(min=1)
        return {"pi": (self.log_probs_ST.exp() * live_ST).sum() / tokens, "rectified": self.rectified_ST.sum() / tokens}


def token_losses(log_probs_ST: Tensor, advantages_ST: Tensor, live_ST: Tensor, tau: float, rectify: str) -> TokenLosses:
    """-A·C(pi)·log pi of each live token (F6), from log pi in nats; what lies at the others is never read."""
    log_pi_ST = torch.where(live_ST, log_probs_ST, 0.0)
    advantages_ST = torch.where(live_ST, advantages_ST, 0.0)
    with torch.no_grad():
        threshold, free = (torch.as_tensor(float(x), device=log_pi_ST.device) for x in (tau, 0.0))
        coefficients_ST = formulas.rectified_coefficient(log_pi_ST, advantages_ST, threshold, rectify == "all", free)
        kappa_ST = formulas.kappa(advantages_ST, coefficients_ST)
    losses_ST = formulas.token_loss(log_pi_ST, kappa_ST)
    return TokenLosses(losses_ST, log_pi_ST.detach(), (coefficients_ST < 1) & live_ST)
