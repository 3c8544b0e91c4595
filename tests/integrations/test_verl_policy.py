"""`policy_loss` against the policy losses that verl registers: value and gradient of one batch of ragged responses.

The table of docs/integrations/verl.md is the one tested here.
"""

from __future__ import annotations

import pytest
import torch

core_algos = pytest.importorskip("verl.trainer.ppo.core_algos", reason="verl is not installed: pip install verl")

from verl.workers.config import ActorConfig  # noqa: E402

from gft_kernels import policy_loss  # noqa: E402

S, T, V, UPSTREAM = 6, 5, 37, 1.7
CLIPS = ({"clip_ratio_low": 0.1, "clip_ratio_high": 0.2}, {"clip_low": 0.1, "clip_high": 0.2})
COUNTERPART = {  # of verl's loss_mode: its options, and ours
    "vanilla": ({**CLIPS[0], "clip_ratio_c": 1.4}, {"objective": "grpo", "delta": 1.4, **CLIPS[1]}),
    "gspo": (CLIPS[0], {"objective": "gspo", **CLIPS[1]}),
    "geo_mean": (CLIPS[0], {"objective": "gmpo", "num_items_in_batch": S, **CLIPS[1]}),
    "sapo": ({"tau_pos": 0.7, "tau_neg": 1.6}, {"objective": "sapo", "gate_positive": 0.7, "gate_negative": 1.6}),
    "cispo": (CLIPS[0], {"objective": "cispo", **CLIPS[1]}),
    "gpg": ({}, {"objective": "gft", "tau": 0.0}),
}
OF_RESPONSES = ("geo_mean", "sapo")  # means over responses, whatever is asked for
REDUCTIONS = {"token-mean": "token-mean", "seq-mean-token-mean": "sequence-mean"}


def batch():
    """Logits, targets, a mask of different lengths, one of them 0, and log-probabilities of two other policies."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(S, T, V, generator=generator)
    targets = torch.randint(V, (S, T), generator=generator)
    mask = torch.arange(T) < torch.tensor([5, 3, 0, 1, 4, 2])[:, None]
    advantages = torch.tensor([1.2, -0.7, 0.4, 0.0, -1.1, 0.9])
    old, ref = (log_probs(logits, targets) + 0.4 * torch.randn(S, T, generator=generator) for _ in range(2))
    return logits, targets, mask, advantages, old, ref


def log_probs(logits, targets):
    return torch.log_softmax(logits, -1).gather(2, targets[..., None])[..., 0]


@pytest.mark.parametrize("aggregation", REDUCTIONS)
@pytest.mark.parametrize("mode", COUNTERPART)
def test_verls_losses_are_those_of_policy_loss(mode, aggregation):
    """With weights of the rollout, where both take them by token."""
    logits, targets, mask, advantages, old, _ = batch()
    theirs, ours = COUNTERPART[mode]
    weights = None if mode == "geo_mean" else torch.linspace(0.4, 1.6, S * T).view(S, T)
    config = ActorConfig(
        strategy="fsdp", rollout_n=3, ppo_micro_batch_size_per_gpu=1, loss_agg_mode=aggregation, **theirs
    )
    leaf = logits.clone().requires_grad_(True)
    now = log_probs(leaf, targets)
    expected, _ = core_algos.get_policy_loss_fn(mode)(
        old, now, advantages[:, None].expand(S, T), mask, config.loss_agg_mode, config, weights
    )
    (UPSTREAM * expected).backward()

    reduction = "sequence-mean" if mode in OF_RESPONSES else REDUCTIONS[aggregation]
    fused = logits.clone().requires_grad_(True)
    ratio = {} if mode == "gpg" else {"old_log_probs": old}
    loss = policy_loss(
        fused, targets, advantages=advantages, mask=mask, weights=weights, reduction=reduction, **ratio, **ours
    )
    (UPSTREAM * loss).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and abs(loss.item()) > 1e-3
    assert (fused.grad - leaf.grad).norm() <= 2e-5 * leaf.grad.norm()


def test_verls_estimate_of_the_kl_is_beta():
    logits, targets, mask, advantages, _, ref = batch()
    leaf, fused = (logits.clone().requires_grad_(True) for _ in range(2))
    estimate = core_algos.kl_penalty(log_probs(leaf, targets), ref, "low_var_kl")
    (UPSTREAM * 0.3 * core_algos.agg_loss(estimate, mask, "token-mean")).backward()
    loss = policy_loss(fused, targets, advantages=0 * advantages, mask=mask, ref_log_probs=ref, beta=0.3)
    (UPSTREAM * loss).backward()
    assert (fused.grad - leaf.grad).norm() <= 2e-5 * leaf.grad.norm()
