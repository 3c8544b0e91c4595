"""OpenRLHF: `python -m gft_kernels.integrations.openrlhf --gft.tau 0.7 <the arguments of train_ppo_ray>`.

OpenRLHF's policy worker makes its loss in its own process, from its own arguments, so the worker's class is replaced by
one that exchanges the loss afterwards. Advantages are OpenRLHF's: `--algo.advantage.estimator group_norm` is F5.

Sizes: S responses, T tokens of the padded response.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from typing import Any

import torch
from torch import Tensor, nn

from gft_kernels import checks
from gft_kernels.integrations.given_log_probs import token_losses
from gft_kernels.options import RECTIFY

# Arguments of OpenRLHF that its own loss would obey and this one does not.
_REQUIRED = {
    "actor.policy_loss_type": ("ppo", "its objective is replaced"),
    "actor.dual_clip": (None, "there is no ratio to clip; of objective grpo in GFTTrainer it is delta"),
    "algo.advantage.is_correction_level": ("off", "there is no ratio to correct"),
}


class GFTPolicyLoss(nn.Module):
    """Called as OpenRLHF's `PolicyLoss` and in its place; OpenRLHF's own `aggregate_loss` sums it up.

    So its denominators are OpenRLHF's: the tokens (`token-mean`) or the responses (`seq-mean-token-mean`) of the whole
    optimizer step over all ranks. Raises: ValueError.
    """

    def __init__(self, tau: float = 0.7, rectify: str = "all", token_level_loss: bool = True):
        super().__init__()
        checks.check_coefficient(tau, rectify)
        self.tau, self.rectify, self.token_level_loss = tau, rectify, token_level_loss

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor,
        rollout_log_probs: Tensor | None = None,
        **totals: Any,
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """The loss, the share of tokens with C(pi) < 1, the drift from the policy at rollout in nats; nothing more.

        log_probs, old_log_probs, advantages, action_mask: (S, T). totals: dp_size, batch_num_tokens,
        global_batch_size, as OpenRLHF counts them. OpenRLHF logs the share as `ppo_clip_ratio`, the drift as `ppo_kl`.
        """
        from openrlhf.models.loss import aggregate_loss

        live_ST = action_mask.bool()
        found = token_losses(log_probs, advantages, live_ST, self.tau, self.rectify)
        loss = aggregate_loss(found.losses_ST, live_ST.float(), token_level_loss=self.token_level_loss, **totals)
        drift = torch.where(live_ST, old_log_probs - log_probs.detach(), 0.0).sum() / live_ST.sum().clamp(min=1)
        return loss, found.means(live_ST)["rectified"], drift, None, None


def policy_worker(base: Any, **loss_options: Any) -> Any:
    """OpenRLHF's `PolicyModelActor`, or a class of its kind, with the loss of its trainer replaced.

    base: the Ray actor class. Raises, in the worker: ValueError naming an argument that the GFT loss would ignore.
    """
    import ray

    plain = base.__ray_metadata__.modified_class

    class GFTPolicyModelActor(plain):  # type: ignore[misc, valid-type]
        def init_model_from_pretrained(self, *args: Any, **kwargs: Any) -> Any:
            result = super().init_model_from_pretrained(*args, **kwargs)
            check_arguments(self.trainer.args)
            token_level = self.trainer.args.actor.loss_agg_mode == "token-mean"
            self.trainer.actor_loss_fn = GFTPolicyLoss(**loss_options, token_level_loss=token_level)
            return result

    return ray.remote(num_gpus=1)(GFTPolicyModelActor)


def check_arguments(args: Any) -> None:
    """Raises ValueError naming the first argument of OpenRLHF's that the GFT loss would silently ignore."""
    for name, (value, reason) in _REQUIRED.items():
        found = args
        for part in name.split("."):
            found = getattr(found, part)
        if found != value:
            raise ValueError(f"--{name} must be {value} with GFT, got {found!r}; {reason}")


def main() -> None:
    """Run OpenRLHF's train_ppo_ray with this process's remaining arguments and the GFT loss."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--gft.tau", dest="tau", type=float, default=0.7)
    parser.add_argument("--gft.rectify", dest="rectify", choices=RECTIFY, default="all")
    options, rest = parser.parse_known_args()
    GFTPolicyLoss(**vars(options))  # a wrong option ends here, not in a worker

    from openrlhf.trainer.ray import ppo_actor

    ppo_actor.PolicyModelActor = policy_worker(ppo_actor.PolicyModelActor, **vars(options))
    sys.argv = [sys.argv[0], *rest]
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__")


if __name__ == "__main__":
    main()
