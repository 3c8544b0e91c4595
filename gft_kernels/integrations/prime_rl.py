"""prime-rl: `import_path = "gft_kernels.integrations.prime_rl.gft_loss"` under `[trainer.loss]` with `type = "custom"`.

prime-rl computes the log-probabilities, holds the advantages and divides the sum by the tokens of the whole step; what
is added is C(pi), F4. Options: `[trainer.loss.kwargs]`.

Sizes: T tokens of one sequence.
"""

from __future__ import annotations

from typing import Any

from gft_kernels import checks
from gft_kernels.integrations.given_log_probs import token_losses


def gft_loss(inputs: Any, tau: float = 0.7, rectify: str = "all") -> Any:
    """-A·C(pi)·log pi (F6) summed over one sequence's tokens, as prime-rl's LossOutputs.

    inputs: prime-rl's LossInputs; trainer_logprobs (T,) in nats with gradient, advantages (T,), loss_mask (T,) bool,
    loss_weights (T,) or None, multiplied with each token's loss. inference_logprobs are not read: GFT has no ratio to
    the policy that sampled.
    Raises: ValueError, TypeError for tau or rectify. Source: arXiv 2604.14258.
    """
    from prime_rl.trainer.rl.loss import LossOutputs

    checks.check_coefficient(tau, rectify)
    live_T = inputs.loss_mask
    found = token_losses(inputs.trainer_logprobs, inputs.advantages, live_T, tau, rectify)
    losses_T = found.losses_ST if inputs.loss_weights is None else found.losses_ST * inputs.loss_weights
    return LossOutputs(loss=losses_T.sum(), metrics=found.means(live_T))
