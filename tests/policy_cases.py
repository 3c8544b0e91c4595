"""A problem of `policy_loss`: rows on both sides of every clip, advantages of both signs, and the float64 truth."""

from __future__ import annotations

from dataclasses import dataclass, field

import oracle
import torch
from cases import UPSTREAM, assert_loss

from gft_kernels import policy_loss
from gft_kernels.objectives import PRESETS
from gft_kernels.options import Credit, Objective, RowCall

OF_RESPONSES = ("gspo", "gmpo")  # theirs is another oracle
OBJECTIVES = tuple(name for name in PRESETS if name not in (*OF_RESPONSES, "asft"))  # which is dft with a beta
WITH_RATIO = ("grpo", "dapo", "dr_grpo", "cispo", "sapo")  # and an advantage
IMITATION = ("sft", "dft", "eaft", "psft", "chord")
CLIPS = {
    "grpo": (0.2, 0.2), "bnpo": (0.2, 0.2), "dapo": (0.2, 0.28), "dr_grpo": (0.2, 0.2), "cispo": (0.3, 0.25),
    "psft": (1.0, 0.1), "sapo": (0.2, 0.2),
}  # fmt: skip
"""Of psft the upper one counts; sapo has none, and its rows lie on both sides of these."""
PENALTIES = {"beta": 0.3, "entropy_coef": 0.2}
CLIPPED = ("grpo", "dapo", "dr_grpo")
ESTIMATORS = ({"kl_estimator": "k1"}, {"kl_estimator": "k2"}, {"kl_estimator": "k2", "kl_cap": 0.4})
BOUNDS = {"delta": 1.5, "beta": 0.3, "kl_cap": 0.4}  # each holds some rows of every problem


@dataclass
class PolicyProblem:
    """Padded logits (S, T, V) with advantages, old and reference log-probabilities per row (S, T)."""

    objective: str
    logits: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor
    advantages: torch.Tensor
    old: torch.Tensor | None
    ref: torch.Tensor
    options: dict = field(default_factory=dict)  # of the oracle and of the loss alike
    weights: torch.Tensor | None = None  # (S, T)

    def arguments(self) -> dict:
        """What `policy_loss` is given beside inputs, targets and backend."""
        given = {"objective": self.objective, "mask": self.mask, "weights": self.weights, **self.options}
        if self.objective not in IMITATION:
            given["advantages"] = self.advantages
        if self.objective in CLIPS:
            given["old_log_probs"] = self.old
            clips = dict(zip(("clip_low", "clip_high"), CLIPS[self.objective], strict=True))
            given |= {name: value for name, value in clips.items() if name in PRESETS[self.objective].options}
        if self.options.get("beta"):
            given["ref_log_probs"] = self.ref
        return {"reduction": "token-mean", "num_items_in_batch": 17, **given}

    def loss(self, inputs=None, **kwargs):
        return policy_loss(self.logits if inputs is None else inputs, self.targets, **{**self.arguments(), **kwargs})

    def run(self, upstream=UPSTREAM, inplace=False, **kwargs):
        """What the loss returns, and the gradient with respect to the logits."""
        leaf = self.logits.detach().clone().requires_grad_(True)
        out = self.loss(leaf * 1, inplace=inplace, **kwargs)
        loss = out[0] if isinstance(out, tuple) else out
        (loss * torch.as_tensor(upstream, dtype=loss.dtype)).sum().backward()
        return out, leaf.grad

    def row_call(self, surrogate: str, **options) -> RowCall:
        """The same problem as a backend sees it, for backends that are asked without `policy_loss`."""
        low, high = CLIPS.get(self.objective, (0.0, 0.0))
        terms = {k: v for k, v in self.options.items() if k in ("beta", "entropy_coef", "delta", "kl_cap")}
        objective = Objective(surrogate, clip_low=low, clip_high=high, old_log_probs_R=self.old.flatten(),
                              ref_log_probs_R=self.ref.flatten(), **terms)  # fmt: skip
        credit = Credit(self.targets.flatten(), self.mask.flatten(), advantages_R=self.advantages.flatten(),
                        num_items=torch.tensor(17.0))  # fmt: skip
        return RowCall(self.logits, credit, objective, want_gradient=True,
                       defer_scale=self.logits.dtype == torch.float16, **options)  # fmt: skip

    def truth(self, upstream=UPSTREAM, weights=None):
        """Weighted losses (R,) and gradient (S, T, V) in float64."""
        advantages = torch.ones_like(self.advantages) if self.objective in IMITATION else self.advantages
        low, high = CLIPS.get(self.objective, (0.0, 0.0))
        live = self.mask.flatten()
        weights = live.double() / 17 if weights is None else weights
        if self.weights is not None:
            weights = weights * self.weights.flatten().double()
        losses, gradient = oracle.loss_and_gradient(
            self.logits.flatten(0, 1), self.targets.flatten(), live, advantages.flatten(), weights, upstream,
            objective=self.objective, old=None if self.old is None else self.old.flatten(), ref=self.ref.flatten(),
            **{"clip_low": low, "clip_high": high, **self.options},
        )  # fmt: skip
        return losses, gradient.view(self.logits.shape)


def problem(objective, responses=6, length=4, vocabulary=131, dtype=torch.float32, std=3.0, seed=0, **options):
    """Every kind of row: log rho from -0.7 to 0.7, A of both signs and 0, a fifth masked, the last column a target.

    On torch's default device, with the same numbers on each.
    """
    with torch.device("cpu"):
        tensors = _tensors(responses, length, vocabulary, dtype, std, seed, options)
    return PolicyProblem(objective, *(x.to(torch.get_default_device()) for x in tensors), options)


def _tensors(responses, length, vocabulary, dtype, std, seed, options):
    """Logits, targets, mask, advantages, old and reference log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    rows = (responses, length)
    logits = (torch.randn(*rows, vocabulary, generator=generator) * std).to(dtype)
    sampled = torch.multinomial(torch.softmax(logits.float(), -1).flatten(0, 1), 1, generator=generator)
    targets = sampled.view(rows)
    targets[0, 0] = vocabulary - 1
    mask = torch.rand(rows, generator=generator) < 0.8
    mask[0, 0] = True
    advantages = torch.randn(rows, generator=generator)
    advantages[1:2] = 0.0
    transform = {k: v for k, v in options.items() if k in ("temperature", "softcap", "logit_scale")}
    log_pi = torch.stack([oracle.log_softmax(row, **transform) for row in logits.flatten(0, 1)])
    log_pi = log_pi.gather(1, targets.view(-1, 1)).view(rows).float()
    old = log_pi + torch.linspace(-0.7, 0.7, log_pi.numel())[torch.randperm(log_pi.numel(), generator=generator)].view(
        rows
    )
    ref = log_pi + torch.randn(rows, generator=generator) * 0.7
    return logits, targets, mask, advantages, old, ref


def bounded_problem(dtype=torch.float32) -> PolicyProblem:
    """Rows on both sides of every bound; the first's target is at -200 nats and its ratio e^200, where A < 0."""
    case = problem("grpo", dtype=dtype, **BOUNDS)
    case.logits[0, 0, 0] = float(case.logits[0, 0, -1]) + 200
    case.advantages[0, 0], case.old[0, 0], case.ref[0, 0] = -1.0, -400.0, -0.5
    return case


def assert_right(case: PolicyProblem, loss, gradient, upstream=UPSTREAM, rtol=2e-5):
    """Loss and gradient are the oracle's, to float32's digits or two roundings of a half type."""
    losses, truth = case.truth(upstream)
    assert_loss(loss, losses)
    info = torch.finfo(gradient.dtype)
    relative = rtol if gradient.dtype == torch.float32 else 2.1 * info.eps / 2
    row_size = truth.abs().amax(-1, keepdim=True)  # scale and entropy term cancel in some entries of a row
    at_one = 2e-8  # where pi = 1 and 2^x may be off by 2 ulp
    allowed = relative * truth.abs().clamp(min=max(info.tiny, 1e-30)) + 1e-6 * row_size + at_one
    assert ((gradient.double() - truth).abs() <= allowed).all()
