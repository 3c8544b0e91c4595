"""A model's output head, and the call of it in which the loss takes the place of the logits.

The model's own forward runs as it is. For the length of one call the head's forward is another: it returns the loss,
and the code behind the head is handed stand-in logits in its place. So whatever a model does before its head needs no
knowledge here, and hooks on the head that gather its weight (FSDP2's) fire as they always do; a hook that needs its
logits takes them. What a model does to its logits behind the head is read from its config and checked once, for each
head and each value there, by sending known logits through that code.

Sizes: S responses, T positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from gft_kernels import formulas, linear_checks
from gft_kernels.options import TokenStats

_SCALES = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
# Whose hooks move weights or measure, whatever the head returns.
_WITHOUT_LOGITS = (
    "torch.distributed.fsdp.",
    "torch.distributed._tools.",
    "torch.utils.module_tracker.",
    "deepspeed.",
    "trl.models.activation_offloading.",
    f"{__name__}.",
)


@dataclass(frozen=True)
class Transform:
    """What a model does to the logits of its head before they are its output."""

    logit_scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        return formulas.transform(logits.double(), self.logit_scale, self.softcap or 0.0, 1.0)


def transforms(model: Any) -> list[Transform]:
    """What the model's numbers may mean, likeliest first: its own, which some families read, and its config's.

    The same name multiplies in one family and divides in another.
    """
    config = model.config.get_text_config(decoder=True)

    def named(*names: str) -> list[float]:
        found = (owner for name in names for owner in (vars(model).get(name), getattr(config, name, None)))
        return [float(value) for value in found if value]

    scales = named(*_SCALES)
    for divisor in named("logits_scaling"):
        scales += [1.0 / divisor, divisor]
    softcaps = named(*_SOFTCAPS)
    return [Transform(scale, cap) for cap, scale in itertools.product([*softcaps, None], [*scales, 1.0])]


def trained_module(head: Any) -> nn.Module:
    """The module that does a head's work: under PEFT's modules_to_save, the copy that is being trained."""
    if not (hasattr(head, "modules_to_save") and hasattr(head, "original_module")):
        return head
    if head.disable_adapters or not head.active_adapters:
        return head.original_module
    return head.modules_to_save[head.active_adapters[0]]


def adapted(head: nn.Module) -> str | None:
    """Why the head's weight alone does not give its output, or None."""
    kind = type(head).__name__
    if hasattr(head, "base_layer") or hasattr(head, "original_module") or hasattr(head, "token_adapter"):
        return f"the output head carries an adapter ({kind})"
    if "forward" in head.__dict__:
        return f"another library has replaced the forward of the output head ({kind})"
    return None


def hooked(*heads: nn.Module) -> str | None:
    """Which hook needs the head's logits or their gradient, and would be handed the loss or not be called; or None.

    What runs before the forward sees hidden states as ever.
    """
    hooks = [modules._global_forward_hooks, modules._global_backward_hooks, modules._global_backward_pre_hooks]
    for head in heads:
        hooks += [head._forward_hooks, head._backward_hooks, head._backward_pre_hooks]
    for hook in itertools.chain.from_iterable(some.values() for some in hooks):
        if not (name := origin(hook)).startswith(_WITHOUT_LOGITS):
            return f"a hook on the output head needs them ({name})"
    return None


def origin(function: Any) -> str:
    """The module a function, method or partial comes from, and its name there."""
    bare = getattr(function, "func", function)
    bare = getattr(bare, "__func__", bare)
    return f"{getattr(bare, '__module__', '')}.{getattr(bare, '__qualname__', type(bare).__name__)}"


@torch.no_grad()
def not_linear(head: Any) -> str | None:
    """Why `weight @ hidden + bias` is not what the head computes, or None. Asked inside the head's own call."""
    kind = type(head).__name__
    weight: Any = getattr(head, "weight", None)
    bias: Any = getattr(head, "bias", None)
    try:
        linear_checks.check_head(weight, bias)
    except (TypeError, ValueError) as error:
        return f"of the output head ({kind}): {error}"
    # The same numbers on every rank, so that all ranks decide alike.
    probe_1D = torch.linspace(-1.0, 1.0, weight.shape[1], device=weight.device).to(weight.dtype)[None]
    theirs, ours = type(head).forward(head, probe_1D), nn.functional.linear(probe_1D, weight, bias)
    if theirs.shape != ours.shape or not torch.allclose(theirs.float(), ours.float(), rtol=1e-2, equal_nan=True):
        return f"the output head ({kind}) is not hidden @ weight^T + bias"
    return None


def probe_logits(head: Any) -> Tensor:
    """(1, 1, V) logits of every size from 0.03 to 2000 and both signs, in the dtype the head would return."""
    weight = head.weight
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    token_V = torch.arange(weight.shape[0], device=weight.device)
    size_V = torch.exp2((token_V % 17) - 5.0)
    return torch.where(token_V % 2 == 0, size_V, -size_V).to(dtype)[None, None]


class HeadCall:
    """One forward of a model during which its head computes a loss instead of logits.

    `with HeadCall(head, loss_of, check) as call: output = forward(...)`; then `call.result()` is what `loss_of(hidden)`
    gave, with the loss as the head's call returned it, unless `call.refusal` says why there is none. With `check`, the
    head is first tested to be a plain product, and `call.explanation` tells what the model did to known logits.
    """

    def __init__(self, head: Any, loss_of: Callable[[Tensor], Tensor | tuple[Tensor, TokenStats]], check: bool):
        self.head, self.loss_of, self.check = head, loss_of, check
        self.refusal: str | None = "the model did not call its output head"
        self.calls = 0
        self.aside = False
        self.probe: Tensor | None = None
        self.loss: Tensor | None = None
        self.stats: TokenStats | None = None

    def __enter__(self) -> HeadCall:
        self.head.forward = self._forward
        # Registered last, so it sees what the hooks of others (FSDP2's, above all) have made of the loss.
        self.hook = self.head.register_forward_hook(self._take_loss)
        return self

    def __exit__(self, *exception) -> None:
        self.hook.remove()
        del self.head.forward

    @contextlib.contextmanager
    def set_aside(self) -> Iterator[None]:
        """The head as it was, for another call of the model that is made inside this one."""
        if self.aside:
            yield
            return
        self.aside = True
        del self.head.forward
        try:
            yield
        finally:
            self.head.forward, self.aside = self._forward, False

    def _forward(self, hidden_STD: Tensor) -> Tensor:
        self.calls += 1
        self.refusal = not_linear(self.head) if self.check else None
        if self.calls > 1:
            self.refusal = "the model calls its output head more than once in a forward"
        if self.refusal is not None:
            return type(self.head).forward(self.head, hidden_STD)
        if self.check:
            self.probe = probe_logits(self.head)
        result = self.loss_of(hidden_STD)
        loss, self.stats = result if isinstance(result, tuple) else (result, None)
        return loss

    def _take_loss(self, head: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self.refusal is not None or self.aside:
            return None  # these are logits
        self.loss = output
        if self.probe is None:
            return arguments[0].new_zeros(*arguments[0].shape[:-1], 1)
        return self.probe.requires_grad_(torch.is_grad_enabled()).clone()  # a leaf could not be scaled in place

    def result(self) -> Tensor | tuple[Tensor, TokenStats]:
        assert self.refusal is None and self.loss is not None
        return self.loss if self.stats is None else (self.loss, self.stats)

    @torch.no_grad()
    def explanation(self, transforms: list[Transform], output: Tensor | None) -> Transform | None:
        """The first transform that turns the probe into the model's output up to rounding; none: a refusal."""
        if self.refusal is not None or self.probe is None:
            return None
        rounding = 4 * torch.finfo(self.probe.dtype).eps  # three operations, each rounded, of numbers that are never 0
        if isinstance(output, Tensor) and output.shape == self.probe.shape:
            for transform in transforms:
                if torch.allclose(output.double(), transform(self.probe), rtol=rounding, atol=0.0):
                    return transform
        self.refusal = "what the model does to its logits is neither a scale nor a softcap that its config names"
        return None

    def clears(self, terms: Tensor | None) -> bool:
        """Whether the model's own loss terms are now known not to read its logits, which were not there to be read.

        They are known with gradients only, by whether one flows back; that it does is a refusal.
        """
        if terms is None or self.probe is None:
            return True
        if terms.requires_grad:
            [gradient] = torch.autograd.grad(terms, self.probe, retain_graph=True, allow_unused=True)
            if gradient is not None:
                self.refusal = "a term that the model adds to its loss is computed from them"
        return torch.is_grad_enabled()
