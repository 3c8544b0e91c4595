"""The textbook GFT loss and its family in float64: the truth of every backend. Imports nothing of the library.

Written for clarity, with autograd for the gradient, one response and one group at a time.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch


def advantages(rewards, groups, normalize="std", eps=1e-6, singleton="reward"):
    """(S,) float64 advantages from (S,) rewards and a list of S group labels."""
    rewards = [Fraction(r.item() if hasattr(r, "item") else r) for r in rewards]  # exact: nothing cancels
    out = [0.0] * len(rewards)
    for label in set(groups):
        members = [s for s, g in enumerate(groups) if g == label]
        values = [rewards[s] for s in members]
        k = len(values)
        mean = sum(values) / k
        for s in members:
            if k == 1:
                out[s] = rewards[s] if singleton == "reward" else 0.0
            elif all(v == values[0] for v in values):
                out[s] = 0.0
            elif normalize == "std":
                std = math.sqrt(sum((v - mean) ** 2 for v in values) / (k - 1))
                out[s] = float(rewards[s] - mean) / (std + eps)
            elif normalize == "mean":
                out[s] = rewards[s] - mean
            elif normalize == "leave-one-out":
                out[s] = rewards[s] - (sum(values) - rewards[s]) / (k - 1)
    return torch.tensor([float(a) for a in out], dtype=torch.float64)


def row_weights(live, responses, reduction, num_items=None):
    """(R,) float64 weights of the reduction; `responses` is a list of R response labels."""
    live = [bool(x) for x in live]
    out = torch.zeros(len(live), dtype=torch.float64)
    if reduction == "sequence-mean":
        present = {responses[r] for r in range(len(live)) if live[r]}
        n = num_items if num_items is not None else max(len(present), 1)
        for label in present:
            rows = [r for r in range(len(live)) if live[r] and responses[r] == label]
            out[rows] = 1.0 / (len(rows) * float(n))
        return out
    n = 1.0
    if reduction == "token-mean":
        n = float(num_items) if num_items is not None else max(sum(live), 1)
    for r, alive in enumerate(live):
        out[r] = 1.0 / n if alive else 0.0
    return out


def log_softmax(logits, temperature=1.0, softcap=None, logit_scale=1.0):
    """(V,) log-probabilities in float64 of one row of raw logits."""
    z = logits.double() * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return torch.log_softmax(z / temperature, dim=0)


def surrogate(
    objective, log_pi, advantage, old, entropy, *, clip_low=0.2, clip_high=0.2, tau=0.7, rectify="all", delta=None,
    gamma=0.1, gate_positive=1.0, gate_negative=1.05, entropy_power=1.0,
):  # fmt: skip
    """One token's loss, differentiable in log_pi, as the papers write it. old None: the policy itself; entropy H."""
    pi = math.exp(float(log_pi.detach()))
    if objective in ("sft", "dft", "gft"):
        tau = {"sft": 0.0, "dft": 1.0, "gft": tau}[objective]
        c = pi if pi < tau else 1.0
        if rectify != "all" and advantage <= 0:
            c = pi / (pi + gamma) if rectify == "bounded" else 1.0
        return torch.zeros_like(log_pi) if advantage * c == 0 else -advantage * c * log_pi  # the limit, at pi = 0 too
    if objective == "luffy":
        return -advantage * log_pi.exp() / (log_pi.exp() + gamma)
    if objective == "chord":
        return -advantage * pi * (1 - pi) * log_pi
    if objective == "eaft":
        return -advantage * min(float(entropy) / math.log(20), 1.0) ** entropy_power * log_pi
    ratio = torch.exp(log_pi - (log_pi.detach() if old is None else old))
    if objective == "cispo":
        return -advantage * ratio.clamp(1 - clip_low, 1 + clip_high).detach() * log_pi
    if objective == "sapo":
        gate = gate_positive if advantage > 0 else gate_negative
        return -advantage * 4 / gate * torch.sigmoid(gate * (ratio - 1))
    if objective == "psft":
        return -torch.minimum(ratio * advantage, ratio.clamp(max=1 + clip_high) * advantage)
    outer = ratio if delta is None else ratio.clamp(max=delta)
    return -torch.minimum(outer * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)


def kl_estimate(log_ratio, name="k3", cap=None):
    """Schulman's estimates of the KL divergence at one token, of log(pi / pi_ref); below -cap, the tangent there."""
    estimate = {
        "k1": lambda r: r,
        "k2": lambda r: r**2 / 2,
        "k3": lambda r: torch.exp(-r) - 1 + r,
    }[name]
    if cap is None or float(log_ratio.detach()) >= -cap:
        return estimate(log_ratio)
    at = torch.tensor(-float(cap), dtype=torch.float64, requires_grad=True)
    value = estimate(at)
    (slope,) = torch.autograd.grad(value, at)
    return value.detach() + slope * (log_ratio - at.detach())


def policy_losses(
    logits, targets, live, advantage, *, objective="gft", old=None, ref=None, beta=0.0, entropy_coef=0.0, kl_cap=None,
    kl_estimator="k3", temperature=1.0, softcap=None, logit_scale=1.0, given=None, given_objective=None,
    given_terms=None, **terms,
):  # fmt: skip
    """Per-row loss (R,) in float64 of a named objective, differentiable in `logits` (R, V).

    `advantage`, `old`, `ref` are (R,) or, the last two, None. terms: of `surrogate`; where `given` (R,) is true the
    objective is `given_objective` with `given_terms`.
    """
    losses = []
    for r in range(len(targets)):
        if not bool(live[r]):
            losses.append(torch.zeros((), dtype=torch.float64))
            continue
        log_pi = log_softmax(logits[r], temperature, softcap, logit_scale)
        chosen = log_pi[int(targets[r])]
        possible = log_pi[log_pi > -math.inf]
        entropy = -(possible.exp() * possible).sum()
        before = None if old is None else old[r].double()
        of_row = given is not None and bool(given[r])
        name, numbers = (given_objective, given_terms) if of_row else (objective, terms)
        loss = surrogate(name, chosen, float(advantage[r]), before, entropy.detach(), **numbers)
        if beta:
            loss = loss + beta * kl_estimate(chosen - ref[r].double(), kl_estimator, kl_cap)
        losses.append(loss - entropy_coef * entropy if entropy_coef else loss)
    return torch.stack(losses) if losses else torch.zeros(0, dtype=torch.float64)


def token_losses(logits, targets, live, advantage, *, tau, rectify="all", **transform):
    """GFT's loss per row (R,) in float64, differentiable in `logits` (R, V); log-probs, C and entropy beside it."""
    losses = policy_losses(logits, targets, live, advantage, tau=tau, rectify=rectify, **transform)
    statistics = torch.zeros(3, len(targets), dtype=torch.float64)
    for r in range(len(targets)):
        if bool(live[r]):
            log_pi = log_softmax(logits[r].detach(), **transform)
            chosen, p = log_pi[int(targets[r])], log_pi.exp()
            rectified = (rectify == "all" or float(advantage[r]) > 0) and float(chosen.exp()) < tau
            entropy = -(p[p > 0] * log_pi[p > 0]).sum()
            statistics[:, r] = torch.stack([chosen, chosen.exp() if rectified else torch.ones_like(chosen), entropy])
    return losses, *statistics


def sequence_losses(logits, targets, live, advantage, old, responses, objective, clip_low, clip_high):
    """The loss of each response in float64 as GSPO and GMPO write it, differentiable in `logits` (R, V).

    `advantage` is (R,), the same on the rows of a response; `responses` a list of R labels.
    """
    losses = []
    for label in sorted(set(responses)):
        rows = [r for r in range(len(targets)) if responses[r] == label and bool(live[r])]
        if not rows:
            continue
        a = float(advantage[rows[0]])
        apart = torch.stack([log_softmax(logits[r])[int(targets[r])] - old[r].double() for r in rows])
        if objective == "gmpo":
            sign = (a > 0) - (a < 0)
            apart = sign * torch.minimum(sign * apart, sign * apart.clamp(-clip_low, clip_high))
        s = apart.mean().exp()
        held = s if objective == "gmpo" else s.clamp(1 - clip_low, 1 + clip_high)
        losses.append(-torch.minimum(s * a, held * a))
    return torch.stack(losses)


def loss_and_gradient(logits, targets, live, advantage, weights, upstream, **options):
    """Sum of upstream·w·loss (upstream () or (R,)) and its gradient with respect to (R, V) logits, in float64."""
    z = logits.detach().double().requires_grad_(True)
    losses = policy_losses(z, targets, live, advantage, **options)
    total = (losses * weights.double() * upstream).sum()
    if total.requires_grad:
        (gradient,) = torch.autograd.grad(total, z)
    else:
        gradient = torch.zeros_like(z)
    return losses.detach() * weights.double(), gradient
