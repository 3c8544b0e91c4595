"""verl's policy loss `gft`: -A·C(pi)·log pi per token (F6), summed up by verl's own agg_loss.

verl imports this module by itself (entry point group `verl.plugins`); `actor.policy_loss.loss_mode=gft` then finds it.
verl computes the log-probabilities and holds the advantages; what is added is C(pi), F4. docs/integrations/verl.md.

Sizes: S responses, T tokens of the padded response.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss
from verl.workers.config import PolicyLossConfig

from gft_kernels import checks
from gft_kernels.integrations.given_log_probs import token_losses

NAME = "gft"


@dataclass
class GFTPolicyLossConfig(PolicyLossConfig):
    """verl's policy_loss section with tau and rectify: `actor.policy_loss._target_` names this class."""

    loss_mode: str = NAME
    tau: float = 0.7
    rectify: str = "all"

    def __post_init__(self):
        if self.loss_mode != NAME:
            raise ValueError(f"loss_mode must be {NAME!r}, got {self.loss_mode!r}; no other reads tau and rectify.")
        checks.check_coefficient(self.tau, self.rectify)


@register_policy_loss(NAME)
def gft_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """The GFT loss of a micro-batch and its metrics, in verl's form of a policy loss.

    log_prob, advantages, response_mask: (S, T); log_prob with gradient, nats. config: verl's ActorConfig; tau and
    rectify are those of a GFTPolicyLossConfig, else 0.7 and "all". old_log_prob is not read: GFT has no ratio to the
    policy that sampled. rollout_is_weights: (S, T), multiplied with each token's loss, as verl's own losses do.
    """
    options = config.policy_loss
    tau, rectify = options.get("tau", GFTPolicyLossConfig.tau), options.get("rectify", GFTPolicyLossConfig.rectify)
    live_ST = response_mask.bool()
    found = token_losses(log_prob, advantages, live_ST, tau, rectify)
    losses_ST = found.losses_ST if rollout_is_weights is None else found.losses_ST * rollout_is_weights
    loss = agg_loss(losses_ST, response_mask, loss_agg_mode, **config.global_batch_info)
    return loss, {f"actor/{name}": mean.item() for name, mean in found.means(live_ST).items()}
