"""A problem of the linear loss: leaves, the float64 truth by the oracle, and the measure of what counts as right.

Everything lies on torch's default device, which the tests set to the one asked for (`pytest --device`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import oracle
import torch
from cases import UPSTREAM, assert_loss

from gft_kernels import gft_linear_loss


@dataclass
class LinearProblem:
    """Leaves of one problem: padded hidden states, head, bias; rewards in pairs, a fifth of the rows masked."""

    hidden: torch.Tensor  # (S, T, D)
    weight: torch.Tensor  # (V, D)
    bias: torch.Tensor | None
    targets: torch.Tensor
    mask: torch.Tensor
    rewards: torch.Tensor
    options: dict = field(default_factory=dict)  # of the oracle and of the loss alike

    def live(self):
        return (self.mask & (self.targets != -100)).flatten().cpu()

    def advantages(self):
        responses, length = self.targets.shape
        return truth_of.advantages(self.rewards, [s // 2 for s in range(responses)]).repeat_interleave(length)

    def logits(self):
        z = double(self.hidden) @ double(self.weight).T
        return z if self.bias is None else z + double(self.bias)

    def leaves(self):
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    def loss(self, **kwargs):
        return gft_linear_loss(
            self.hidden, self.weight, self.targets, bias=self.bias, mask=self.mask,
            **{"rewards": self.rewards, "group_size": 2, **self.options, **kwargs},
        )  # fmt: skip

    def gradients(self, upstream=UPSTREAM, **kwargs):
        out = self.loss(**kwargs)
        loss = out[0] if isinstance(out, tuple) else out
        return out, torch.autograd.grad((loss * upstream).sum(), self.leaves())

    def truth(self, upstream=UPSTREAM, reduction="token-mean"):
        """Loss (per weighted row) and gradients in float64, from the oracle's gradient of the logits."""
        _, length, hidden_size = self.hidden.shape
        x, w, logits = double(self.hidden).view(-1, hidden_size), double(self.weight), self.logits().flatten(0, 1)
        live = self.live()
        advantages = self.advantages()
        weights = truth_of.row_weights(live, [r // length for r in range(len(live))], reduction)
        losses, dlogits = truth_of.loss_and_gradient(
            logits, self.targets.flatten(), live, advantages, weights, upstream, **{"tau": 0.7, **self.options}
        )
        gradients = [(dlogits @ w).view(self.hidden.shape), dlogits.T @ x]
        return losses, gradients if self.bias is None else [*gradients, dlogits.sum(0)]


def problem(responses=4, length=3, hidden_size=48, vocabulary=101, dtype=torch.float32, std=3.0, bias=False, seed=0,
            **options):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, size=1.0):
        values = torch.randn(*shape, generator=generator, device="cpu") * size
        return here(values.to(dtype)).requires_grad_(True)

    mask = torch.rand(responses, length, generator=generator, device="cpu") < 0.8
    mask[0, 0] = True
    targets = torch.randint(vocabulary, (responses, length), generator=generator, device="cpu")
    targets[0, 0] = vocabulary - 1  # the last column is the one a tail forgets
    targets[-1, -1] = -100
    return LinearProblem(
        random(responses, length, hidden_size),
        random(vocabulary, hidden_size, size=std / hidden_size**0.5),
        random(vocabulary) if bias else None,
        here(targets), here(mask), here(torch.rand(responses, generator=generator, device="cpu")), options,
    )  # fmt: skip


class _OnTheCpu:
    """The oracle's functions, on the CPU whatever the default device is."""

    def __getattr__(self, name):
        def call(*args, **kwargs):
            with torch.device("cpu"):
                return getattr(oracle, name)(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in args), **kwargs)

        return call


truth_of = _OnTheCpu()


def here(values):
    return values.to(torch.get_default_device())


def double(values):
    """Detached, in float64, on the CPU, where the oracle lives."""
    return values.detach().double().cpu()


def relative(value, truth):
    return float((double(value) - double(truth)).norm() / double(truth).norm().clamp(min=1e-300))


def one_rounding(truth, dtype):
    """The relative error in norm that rounding the truth once would have, and float32's noise; on a GPU four times it.

    There halves are multiplied as halves: the logits' gradient is rounded before the products as well, and what rows
    cancel of each other leaves more of that.
    """
    times = 1.05 if torch.get_default_device().type == "cpu" else 4.0
    return times * relative(truth.to(dtype), truth) + 1e-5


def assert_right(case, upstream=UPSTREAM, **kwargs):
    """Loss to 1e-5; gradients to one rounding of their dtype."""
    loss, gradients = case.gradients(upstream, **kwargs)
    losses, truth = case.truth(upstream, kwargs.get("reduction", "token-mean"))
    assert_loss(loss, losses)
    for gradient, leaf, expected in zip(gradients, case.leaves(), truth, strict=True):
        assert gradient.shape == leaf.shape and gradient.dtype == leaf.dtype
        error, limit = relative(gradient, expected), one_rounding(expected, leaf.dtype)
        assert error <= limit, f"{error:.2e} of {limit:.2e}"
    return loss, gradients
