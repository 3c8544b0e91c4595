"""A problem of the linear loss: leaves, the float64 truth by the oracle, and the measure of what counts as right.

Everything lies on torch's default device, which the tests set to the one asked for (`pytest --device`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import oracle
import torch
from cases import UPSTREAM, assert_loss

from gft_kernels import gft_linear_loss
from gft_kernels.linear import products

NOISE = 3e-6
"""Of an element of the logits' gradient, relative: float32 work leaves 1e-6, in root mean square."""


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

    def logits_gradient(self, upstream=UPSTREAM, reduction="token-mean"):
        """By the oracle: loss (per weighted row), the logits' gradient (R, V) as the products take it, and its doubt.

        Where halves are multiplied as halves it is rounded to them, before the upstream gradient of a scalar loss, and
        NOISE decides which way an element beside a tie goes: the doubt is how far that moves it, elsewhere 0.
        """
        length, live = self.targets.shape[1], self.live()
        weights = truth_of.row_weights(live, [r // length for r in range(len(live))], reduction)
        before, after = (upstream, 1.0) if reduction == "none" else (1.0, upstream)
        losses, exact = truth_of.loss_and_gradient(
            self.logits().flatten(0, 1), self.targets.flatten(), live, self.advantages(), weights, before,
            **{"tau": 0.7, **self.options},
        )  # fmt: skip
        dtype = self.hidden.dtype
        if dtype == torch.float32 or not products.multiplies_into_float32(self.hidden.device, dtype):
            return losses, exact * after, torch.zeros_like(exact)
        low, value, high = (rounded(exact * (1 + noise), dtype) * after for noise in (-NOISE, 0.0, NOISE))
        return losses, value, high - low

    def of_leaves(self, dlogits, power=1):
        """The gradients of hidden, weight and bias from the logits'; power 2: of each, its terms' squares summed."""
        g, x, w = (values**power for values in (dlogits, double(self.hidden).flatten(0, 1), double(self.weight)))
        return [(g @ w).view(self.hidden.shape), g.T @ x, g.sum(0)][: len(self.leaves())]

    def truth(self, upstream=UPSTREAM, reduction="token-mean"):
        """Loss (per weighted row) and gradients in float64, from the oracle's gradient of the logits."""
        losses, dlogits, _ = self.logits_gradient(upstream, reduction)
        return losses, self.of_leaves(dlogits)


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


def rounded(values, dtype):
    """float64 values with as many digits as `dtype` has, at any exponent: float16 ones are scaled by a power of two."""
    digits, exponent = torch.frexp(values)
    step = torch.finfo(dtype).eps / 2
    return torch.ldexp(torch.round(digits / step) * step, exponent)


def assert_gradients(case, gradients, upstream=UPSTREAM, reduction="token-mean"):
    """Each gradient is the truth rounded once to its dtype, in norm; returns the truth's losses.

    That rounding may cost 1.05 times what it costs the truth itself, float32 sums 1e-5, and elements in doubt what
    independent ones add up to. The rounding of the logits' gradient costs nothing: how much of it a sum keeps is luck
    (of one number, 2.8 roundings), so the truth has it too. Measured, a half's limit is 1.05 to 1.2 times its error.
    """
    losses, dlogits, doubt = case.logits_gradient(upstream, reduction)
    expected = zip(gradients, case.of_leaves(dlogits), case.of_leaves(doubt, power=2), strict=True)
    for gradient, truth, squares in expected:
        once = 1.05 * relative(truth.to(gradient.dtype), truth)
        limit = math.hypot(once, float(squares.sum().sqrt() / truth.norm().clamp(min=1e-300))) + 1e-5
        error = relative(gradient, truth)
        assert error <= limit, f"{error:.2e} of {limit:.2e}"
    return losses


def assert_right(case, upstream=UPSTREAM, **kwargs):
    """Loss to 1e-5; gradients to one rounding of their dtype."""
    loss, gradients = case.gradients(upstream, **kwargs)
    for gradient, leaf in zip(gradients, case.leaves(), strict=True):
        assert gradient.shape == leaf.shape and gradient.dtype == leaf.dtype
    assert_loss(loss, assert_gradients(case, gradients, upstream, kwargs.get("reduction", "token-mean")))
    return loss, gradients
