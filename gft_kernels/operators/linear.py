"""The linear loss as one torch operator, `gft::linear_loss`, with the gradients beside the loss.

For a scalar loss backward is one multiplication of what forward left: in float32, rounded once. If autograd is about
to drop the graph, a gradient that needs no rounding is scaled where it lies; if the graph is retained, out of place, so
it can be walked again. For reduction "none" the weights of the rows arrive with the upstream gradient: forward keeps
nothing but its inputs, and backward runs the operator again with those weights (four products instead of three).
"""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from gft_kernels.linear import chunks
from gft_kernels.operators import derivatives, row
from gft_kernels.operators.packing import Packing
from gft_kernels.options import LinearCall, LinearResult, RowResult

_TENSORS = 3  # hidden states, weight and bias come first
_SHOWN = 6  # of what it returns; the others are for its backward
_PACKING = Packing(LinearCall)
_pack, _unpack = _PACKING.pack, _PACKING.unpack
_SCHEMA = (
    f"({_PACKING.schema}) -> (Tensor loss, Tensor log_probs, Tensor coefficients, Tensor advantages, Tensor entropy, "
    "Tensor kept, Tensor hidden_gradient, Tensor weight_gradient, Tensor bias_gradient, Tensor unit)"
)


def linear_loss(call: LinearCall, backend: str) -> RowResult:
    """Run a call through its operator; the loss carries the gradients it asks for."""
    inputs = call.hidden_STD, call.weight_VD, call.bias_V
    derivatives.refuse_others(*inputs)
    outputs = _operator(call, backend)[:_SHOWN] if row.is_watched(*inputs) else _Unwatched.apply(*inputs, call, backend)
    loss, log_probs, coefficients, advantages, *optional = outputs
    wanted = (call.want_entropy, chunks.reports_kept(call))
    entropy, kept = (found if asked else None for found, asked in zip(optional, wanted, strict=True))
    return RowResult(loss, log_probs, coefficients, advantages, entropy_R=entropy, kept_R=kept)


def _operator(call: LinearCall, backend: str) -> tuple[Tensor, ...]:
    return torch.ops.gft.linear_loss(*_pack(call, backend))


def _run(*arguments) -> tuple[Tensor, ...]:
    return _compute(*_unpack(arguments))


def _compute(call: LinearCall, backend: str) -> tuple[Tensor, ...]:
    """An operator returns no None: what was not asked for is empty."""
    with torch.autocast(call.hidden_STD.device.type, enabled=False):  # the dtypes are decided already
        result = chunks.run(call, backend)
    outputs = [getattr(result, field.name) for field in fields(LinearResult)]
    return tuple(result.loss.new_empty(0) if x is None else x for x in outputs)


def _fake(*arguments) -> tuple[Tensor, ...]:
    call, _ = _unpack(arguments)
    rows, (vocabulary, hidden_size) = call.credit.targets_R.shape[0], call.weight_VD.shape

    def new(*shape: int, wanted: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
        return call.hidden_STD.new_empty(shape if wanted else (0,), dtype=dtype if wanted else torch.float32)

    return (
        new(rows) if call.credit.reduction == "none" else new(),
        *(new(rows) for _ in range(3)),
        new(rows, wanted=call.want_entropy),
        new(rows, wanted=chunks.reports_kept(call)),
        new(rows, hidden_size, wanted=call.want_hidden, dtype=call.accum_dtype),
        new(vocabulary, hidden_size, wanted=call.want_weight, dtype=call.accum_dtype),
        new(vocabulary, wanted=call.want_bias, dtype=call.accum_dtype),
        new(wanted=chunks.scales_gradient(call)),
    )


def _setup_context(ctx, inputs: tuple, output: tuple) -> None:
    _loss, *others = output
    ctx.mark_non_differentiable(*others)
    call, _ = _unpack(inputs)
    _keep(ctx, inputs, call.credit.reduction == "none", output)


def _keep(ctx, inputs: tuple, per_row: bool, output: tuple) -> None:
    """What a backward needs of a forward; inputs: what an operator takes, with the backend last."""
    ctx.set_materialize_grads(False)
    derivatives.keep_path(ctx, *inputs[:_TENSORS])
    ctx.per_row = per_row
    ctx.inputs = [None if isinstance(x, Tensor) else x for x in inputs]
    if ctx.per_row:
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
    else:
        ctx.like = [None if x is None else (x.shape, x.dtype) for x in inputs[:_TENSORS]]
        ctx.save_for_backward(*output[_SHOWN:])


@derivatives.first_only
def _backward(ctx, upstream: Tensor | None, *_non_differentiable) -> tuple:
    return (*_gradients(ctx, upstream), *[None] * (len(ctx.inputs) - _TENSORS))


def _gradients(ctx, upstream: Tensor | None) -> list[Tensor | None]:
    """Of hidden states, weight and bias."""
    if upstream is None:
        return [None] * _TENSORS
    return _recomputed(ctx, upstream) if ctx.per_row else _scaled(ctx, upstream)


class _Unwatched(torch.autograd.Function):
    """`gft::linear_loss` for calls that nobody watches."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, call, backend):
        output = _compute(call, backend)
        shown = output[:_SHOWN]
        ctx.mark_non_differentiable(*shown[1:])
        _keep(ctx, (hidden, weight, bias, *_pack(call, backend)[_TENSORS:]), call.credit.reduction == "none", output)
        return shown

    @staticmethod
    @derivatives.first_only
    def backward(ctx, upstream, *_non_differentiable):
        return *_gradients(ctx, upstream), None, None


def _scaled(ctx, upstream: Tensor) -> list[Tensor | None]:
    *gradients, unit = ctx.saved_tensors
    factor = upstream.float() * unit if unit.numel() else upstream.float()
    wanted = zip(gradients, ctx.like, ctx.needs_input_grad, strict=False)
    return [_finish(g, factor, ctx.inputs[-1], *like) if needed else None for g, like, needed in wanted]


def _recomputed(ctx, upstream: Tensor) -> list[Tensor | None]:
    saved = ctx.saved_tensors
    arguments = tuple(x if y is None else y for x, y in zip(saved, ctx.inputs, strict=True))
    call, backend = _unpack(arguments)
    wanted = ctx.needs_input_grad[:_TENSORS]
    call = replace(
        call,
        credit=replace(call.credit, reduction="sum"),
        upstream_R=upstream.float().contiguous(),
        want_stats=False,
        want_entropy=False,
        want_hidden=wanted[0],
        want_weight=wanted[1],
        want_bias=wanted[2],
    )
    inputs = call.hidden_STD, call.weight_VD, call.bias_V, call.upstream_R
    outputs = _operator(call, backend) if row.is_watched(*inputs) else _compute(call, backend)
    *gradients, unit = outputs[_SHOWN:]
    factor = unit if unit.numel() else torch.ones((), dtype=torch.float32, device=upstream.device)
    asked = zip(gradients, arguments, wanted, strict=False)
    return [_finish(gradient, factor, backend, x.shape, x.dtype) if needed else None for gradient, x, needed in asked]


def _finish(gradient: Tensor, factor: Tensor, backend: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """gradient·factor in float32, rounded once to an input's dtype, in its shape."""
    last = gradient.dtype == dtype and derivatives.may_overwrite(gradient, factor)
    if gradient.dtype != dtype:
        gradient = gradient.float()  # as it is, unless accum_dtype says otherwise
    rows_1RD = gradient.reshape(1, -1, max(gradient.shape[-1], 1))
    return row.scaled(rows_1RD, None, factor, backend, last, None if last else dtype).view(shape)


_OPERATOR = torch.library.custom_op("gft::linear_loss", _run, mutates_args=(), schema=_SCHEMA)
_OPERATOR.register_fake(_fake)
_OPERATOR.register_autograd(_backward, setup_context=_setup_context)
