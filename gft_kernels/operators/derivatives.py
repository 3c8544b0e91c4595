"""The losses have one derivative, the first, in reverse mode. Whoever asks for another is told so, not given zeros.

torch.compile: forward mode and torch.func are refused while it traces, so with fullgraph=True the refusal is
torch.compile's own. A second derivative of a compiled loss is none of the loss's doing: the graph's backward is
compiled as a function of what forward kept, which is the gradient, a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps

import torch
from torch import Tensor
from torch.autograd import forward_ad

REMEDY = "write that loss in plain torch operations"
_TWICE = f"the loss must be differentiated once, got a derivative of its gradient (create_graph=True); {REMEDY}"


def keep_path(ctx, *inputs: Tensor | None) -> None:
    """Keep, for `first_only`, a tensor of no elements from which the graph leads back to the inputs."""
    ctx.path = None
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    if wanted and not torch.compiler.is_compiling():
        with torch.enable_grad():
            ctx.path = _refusing(wanted[0].new_empty(0), *wanted)


def _refusing(value: Tensor, *sources: Tensor) -> Tensor:
    """The value as a function of the sources, whose derivative raises."""
    return torch._C._functions.DelayedError(_TWICE, 1 + len(sources))(value, *sources)[0]


def first_only(backward: Callable) -> Callable:
    """A backward whose gradients raise when they are differentiated again, by any input or by the upstream gradient.

    autograd's own once_differentiable is silent for an upstream that needs no gradient, the usual 1, and its error
    lies on no way to the inputs: a gradient penalty would add nothing, a Hessian be zero. create_graph=True alone is
    allowed; what it made is only never differentiated. The forward must have called `keep_path`.
    """

    @wraps(backward)
    def wrapped(ctx, *upstream):
        if not torch.is_grad_enabled():
            return backward(ctx, *upstream)
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        if torch.compiler.is_compiling():
            return gradients
        sources = [x for x in (ctx.path, *upstream) if x is not None and x.requires_grad]
        return tuple(None if x is None else _refusing(x.detach(), *sources) for x in gradients)

    return wrapped


def refuse_others(*inputs: Tensor | None) -> None:
    """Raises RuntimeError for forward-mode tangents and the derivatives of torch.func; its vmap passes without one."""
    kinds = set(_transforms())
    inside = bool(kinds) and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if kinds & {"grad", "jvp"} or (inside and any(map(_needs_gradient, inputs))):
        raise RuntimeError(
            f"the loss must be differentiated outside torch.func, got a derivative with {', '.join(sorted(kinds))}; "
            f"call backward() or autograd.grad on the whole batch, or {REMEDY}"
        )
    if forward_ad._current_level >= 0:  # torch.compile guards on this number
        compiling = torch.compiler.is_compiling()  # then a tensor does not show its tangent
        (torch.compiler.disable(_refuse_tangents) if compiling else _refuse_tangents)(inputs)


def _transforms() -> tuple[str, ...]:
    """Names of the torch.func transforms that are active."""
    return tuple(level.key().name.lower() for level in torch._C._functorch.get_interpreter_stack() or ())


# What torch.compiler.assume_constant_result does, which would import the compiler: it guards on the transforms itself.
setattr(_transforms, "_dynamo_marked_constant", True)  # noqa: B010


def _refuse_tangents(inputs: Sequence[Tensor | None]) -> None:
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise RuntimeError(f"the loss must be differentiated in reverse mode, got a forward-mode tangent; {REMEDY}")


def _needs_gradient(value: Tensor | None) -> bool:
    """Whether the tensor under what vmap wrapped around it is part of a graph."""
    while value is not None and torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value is not None and value.requires_grad


def is_batched(value: Tensor) -> bool:
    """Whether torch.func or a vectorized backward wrapped it: it may hold many numbers where one is to be seen."""
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(value) or functorch.is_legacy_batchedtensor(value)


def may_overwrite(saved: Tensor, upstream: Tensor) -> bool:
    """Whether a backward may scale what it saved where it lies, and hand that out: nobody will ask for it again.

    Not while it is traced, nor captured as a CUDA graph, which is replayed at will; nor under torch.func, where one
    saved tensor meets many upstream gradients.
    """
    if torch.compiler.is_compiling() or not type(saved) is type(upstream) is Tensor:
        return False
    if is_batched(saved) or is_batched(upstream):
        return False
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    graph_is_dropped = keeps is not None and not keeps()
    return graph_is_dropped and not (saved.is_cuda and torch.cuda.is_current_stream_capturing())
