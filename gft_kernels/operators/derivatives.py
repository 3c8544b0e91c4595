"""The losses have one derivative, the first, in reverse mode. Whoever asks for another is told so, not given zeros."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor
from torch.autograd import forward_ad

REMEDY = "write that loss in plain torch operations"
_TWICE = f"the loss must be differentiated once, got a derivative of its gradient (create_graph=True); {REMEDY}"


def first_only(backward: Callable) -> Callable:
    """A backward whose gradients raise when they are differentiated again, whatever the upstream gradient is.

    autograd's own once_differentiable is silent for an upstream that needs no gradient, the usual 1: a gradient
    penalty would then add nothing. create_graph=True alone is allowed; what it made is only never differentiated.
    """

    @wraps(backward)
    def wrapped(ctx, *upstream):
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return gradients
        refuse = torch._C._functions.DelayedError(_TWICE, 1)
        return tuple(None if x is None else refuse(x.detach().requires_grad_(True)) for x in gradients)

    return wrapped


def refuse_others(*inputs: Tensor | None) -> None:
    """Raises RuntimeError for forward-mode tangents and the derivatives of torch.func; its vmap passes without one."""
    if torch.compiler.is_compiling():
        return
    kinds = {level.key().name.lower() for level in torch._C._functorch.get_interpreter_stack() or ()}
    if kinds & {"grad", "jvp"} or (kinds and torch.is_grad_enabled() and any(map(_needs_gradient, inputs))):
        raise RuntimeError(
            f"the loss must be differentiated outside torch.func, got a derivative with {', '.join(sorted(kinds))}; "
            f"call backward() or autograd.grad on the whole batch, or {REMEDY}"
        )
    if forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise RuntimeError(f"the loss must be differentiated in reverse mode, got a forward-mode tangent; {REMEDY}")


def _needs_gradient(value: Tensor | None) -> bool:
    """Whether the tensor under what vmap wrapped around it is part of a graph."""
    while value is not None and torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value is not None and value.requires_grad


def graph_is_dropped() -> bool:
    """Whether the running backward frees its graph, so that what it saved may be handed out or overwritten."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is not None and not keeps()
