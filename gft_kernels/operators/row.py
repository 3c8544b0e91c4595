"""The loss as torch operators with a gradient that is ready when the loss is.

Two operators share one schema, which follows from the fields of a `RowCall` (packing.py): `gft::row_loss` returns the
gradient beside the loss; `gft::row_loss_` writes it where the logits were. A torch.compile graph sees each as one node.

Backward is one multiplication by the upstream gradient, where the gradient lies, and none where that is 1. A graph that
is kept has its saved gradient left as it was, so that it can be walked again; in place there is only the logits'
storage, and a second walk is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gft_kernels import backends, checks, distributed, sequences
from gft_kernels.operators import derivatives
from gft_kernels.operators.packing import Packing
from gft_kernels.options import Credit, RowCall, RowResult, gradient_for

_PACKING = Packing(RowCall)
_ARGUMENTS = _PACKING.schema.removeprefix("Tensor logits_STV, ")
_PER_ROW = "Tensor loss, Tensor log_probs, Tensor coefficients, Tensor advantages, Tensor row_scale, Tensor entropy"
_ROW_SCALE = 4  # its place there


def row_loss(call: RowCall, backend: str) -> RowResult:
    """Run a call through its operator; the loss carries the gradient if `call.want_gradient`."""
    derivatives.refuse_others(call.logits_STV)
    traced = torch.compiler.is_compiling()
    if call.want_gradient and call.inplace:
        outputs = _InPlace.apply(call.logits_STV, *(_pack(call, backend) if traced else (call, backend)))
    elif call.want_gradient and not traced:
        outputs = _OutOfPlace.apply(call.logits_STV, call, backend)
    else:
        *outputs, _gradient = _run(call.logits_STV, call, backend)
    return _result(call, outputs)


def _pack(call: RowCall, backend: str) -> tuple:
    """A call as what an operator takes behind the logits."""
    return _PACKING.pack(call, backend)[1:]


def _unpack(logits: Tensor, arguments: Sequence) -> tuple[RowCall, str]:
    return _PACKING.unpack((logits, *arguments))


def _result(call: RowCall, outputs: Sequence[Tensor]) -> RowResult:
    loss, log_probs, coefficients, advantages, _row_scale, entropy = outputs
    return RowResult(loss, log_probs, coefficients, advantages, entropy_R=entropy if call.want_entropy else None)


def _compute(call: RowCall, backend: str) -> tuple[Tensor | None, ...]:
    """Check the values, choose the backend, run it. The operators' outputs, None where they were not asked for."""
    width = call.logits_STV.shape[-1]
    shard = distributed.meet(call.process_group, width, call.logits_STV.device)
    checks.check_values(call.credit, call.objective, width if shard is None else shard.vocabulary)
    module = backends.choose(backend, call)
    r = _passes(module if shard is None else distributed.VocabularyParallel(module, shard), call)
    statistics = (r.log_probs_R, r.coefficients_R) if call.reads_every_live_row else (None, None)
    return r.loss, *statistics, r.advantages_R, r.row_scale_R, r.entropy_R, r.gradient_STV


def _passes(module: Any, call: RowCall) -> RowResult:
    """One pass, or where a response's ratio is wanted a first one for log pi."""
    if not call.objective.over_sequence:
        return module.run(call)
    unwanted = dict.fromkeys(("want_gradient", "inplace", "want_entropy", "defer_scale"), False)
    return sequences.two_passes(module.run, call, unwanted)


def _row_loss(logits: Tensor, *arguments) -> tuple[Tensor, ...]:
    """An operator returns no None: what was not asked for is empty."""
    *outputs, gradient = _compute(*_unpack(logits, arguments))
    gradient = logits.new_empty(0) if gradient is None else gradient
    return *(logits.new_empty(0, dtype=torch.float32) if x is None else x for x in outputs), gradient


def _row_loss_(logits: Tensor, *arguments) -> tuple[Tensor, ...]:
    return _row_loss(logits, *arguments)[:-1]


def _fake_per_row(logits: Tensor, *arguments) -> tuple[Tensor, ...]:
    call, _ = _unpack(logits, arguments)
    rows = call.credit.targets_R.shape[0]

    def per_row(wanted: bool = True) -> Tensor:
        return logits.new_empty(rows if wanted else 0, dtype=torch.float32)

    loss = per_row() if call.credit.reduction == "none" else logits.new_empty((), dtype=torch.float32)
    statistics = (per_row(call.reads_every_live_row) for _ in range(2))
    return loss, *statistics, per_row(), per_row(call.defer_scale), per_row(call.want_entropy)


def _fake(logits: Tensor, *arguments) -> tuple[Tensor, ...]:
    call, _ = _unpack(logits, arguments)
    gradient = logits.new_empty(logits.shape if call.want_gradient else (0,), dtype=call.gradient_dtype)
    return (*_fake_per_row(logits, *arguments), gradient)


def _setup_context(ctx, inputs: tuple, output: tuple) -> None:
    logits, *arguments = inputs
    *per_row, gradient = output
    ctx.mark_non_differentiable(gradient)
    _keep(ctx, logits, arguments, per_row, gradient)


def _keep(ctx, logits: Tensor, arguments: Sequence, per_row: Sequence[Tensor | None], gradient: Tensor | None) -> None:
    """What a backward needs of a forward; the last argument is the backend."""
    _loss, *others = per_row
    ctx.mark_non_differentiable(*[x for x in others if x is not None])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradient, per_row[_ROW_SCALE])
    derivatives.keep_path(ctx, logits)
    ctx.backend, ctx.nothing = arguments[-1], (None,) * len(arguments)


@derivatives.first_only
def _backward(ctx, upstream: Tensor | None, *_non_differentiable) -> tuple:
    if upstream is None:
        return None, *ctx.nothing
    return torch.ops.gft.scale(*ctx.saved_tensors, upstream, ctx.backend), *ctx.nothing


def scaled(
    gradient: Tensor, row_scale: Tensor | None, upstream: Tensor, backend: str, inplace: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """`gft::scale`, to dtype (None: its own); or `gft::scale_`: the gradient scaled where it lies, which at factor 1
    touches nothing."""
    row_scale = None if row_scale is None or not row_scale.numel() else row_scale
    if inplace and row_scale is None and _is_one(upstream):
        return gradient.detach()
    if not is_watched(gradient, upstream):
        if inplace:
            torch.autograd.graph.increment_version(gradient)
        result = _scale_with(gradient, row_scale, upstream, backend, inplace, dtype)
        return result.detach() if inplace else result
    arguments = (gradient, gradient.new_empty(0, dtype=torch.float32) if row_scale is None else row_scale, upstream)
    if not inplace:
        return torch.ops.gft.scale(*arguments, backend, dtype)
    torch.ops.gft.scale_(*arguments, backend)
    return gradient.detach()


def _is_one(upstream: Tensor) -> bool:
    """Whether scaling can be left out, where looking is free: an untraced scalar on the CPU. Kernels look for
    themselves."""
    if torch.compiler.is_compiling() or type(upstream) is not Tensor or derivatives.is_batched(upstream):
        return False
    return upstream.device.type == "cpu" and upstream.dim() == 0 and float(upstream) == 1.0


def _scale(
    gradient: Tensor, row_scale: Tensor, upstream: Tensor, backend: str, dtype: torch.dtype | None = None
) -> Tensor:
    return _scale_with(gradient, row_scale if row_scale.numel() else None, upstream, backend, False, dtype)


def _scale_(gradient: Tensor, row_scale: Tensor, upstream: Tensor, backend: str) -> None:
    _scale_with(gradient, row_scale if row_scale.numel() else None, upstream, backend, True, None)


def _scale_with(
    gradient: Tensor, row_scale: Tensor | None, upstream: Tensor, backend: str, inplace: bool, dtype: torch.dtype | None
) -> Tensor:
    if not gradient.numel():  # no rows, or an empty shard of the vocabulary: nothing to launch
        return gradient_for(gradient, inplace, dtype)
    asked = RowCall(gradient, Credit(targets_R=gradient))  # a backend that serves this memory; it has no rows' credit
    return backends.choose(backend, asked).scale(gradient, row_scale, upstream.contiguous(), inplace, dtype)


def _run(logits: Tensor, call: RowCall, backend: str) -> tuple[Tensor | None, ...]:
    """`gft::row_loss` of a call; logits: its own, as autograd hands them on."""
    if is_watched(logits):
        return torch.ops.gft.row_loss(logits, *_pack(call, backend))
    return _compute(call, backend)


class _OutOfPlace(torch.autograd.Function):
    """`gft::row_loss` for calls that are not traced. Nobody but this graph ever holds the gradient: what walks it last
    scales it where it lies.
    """

    @staticmethod
    def forward(ctx, logits, call, backend):
        *per_row, gradient = _run(logits, call, backend)
        _keep(ctx, logits, (call, backend), per_row, gradient)
        return tuple(per_row)

    @staticmethod
    @derivatives.first_only
    def backward(ctx, upstream, *_non_differentiable):
        if upstream is None:
            return None, *ctx.nothing
        gradient, row_scale = ctx.saved_tensors
        last = derivatives.may_overwrite(gradient, upstream)
        return scaled(gradient, row_scale, upstream, ctx.backend, inplace=last), *ctx.nothing


class _InPlace(torch.autograd.Function):
    """`gft::row_loss_` with the logits' storage as the saved gradient (a mutating operator cannot carry autograd)."""

    @staticmethod
    def forward(ctx, logits, *arguments):
        per_row = _overwrite(logits, *arguments)
        _keep(ctx, logits, arguments, per_row, logits)
        ctx.spent = False
        return per_row

    @staticmethod
    @derivatives.first_only
    def backward(ctx, upstream, *_non_differentiable):
        if upstream is None:
            return None, *ctx.nothing
        if ctx.spent:
            raise RuntimeError(
                "inplace must be False for a graph walked backward more than once, got a second backward; "
                "the first one scaled the only copy of the gradient"
            )
        ctx.spent = True
        gradient, row_scale = ctx.saved_tensors
        return scaled(gradient, row_scale, upstream, ctx.backend, inplace=True), *ctx.nothing


def _overwrite(logits: Tensor, *arguments) -> tuple[Tensor | None, ...]:
    """`gft::row_loss_`, of a call and its backend or, where they are traced, of what an operator takes of both."""
    if is_watched(logits):
        return torch.ops.gft.row_loss_(logits, *(arguments if torch.compiler.is_compiling() else _pack(*arguments)))
    torch.autograd.graph.increment_version(logits)
    return _compute(*arguments)[:-1]


def is_watched(*inputs: Tensor | None) -> bool:
    """Whether a call of these tensors has to pass through an operator, which alone knows shapes without numbers.

    Where nobody watches it should not: torch's way through one fetches the whole schema once for each argument, for its
    backward or the version of what it writes, and that is more than half of a small call's time.
    """
    if checks.is_watched() or any(type(x) not in (Tensor, Parameter, NoneType) for x in inputs):
        return True
    return any(x is not None and (x.is_meta or derivatives.is_batched(x)) for x in inputs)


_FUNCTIONAL = torch.library.custom_op(
    "gft::row_loss",
    _row_loss,
    mutates_args=(),
    schema=f"(Tensor logits, {_ARGUMENTS}) -> ({_PER_ROW}, Tensor gradient)",
)
_FUNCTIONAL.register_fake(_fake)
_FUNCTIONAL.register_autograd(_backward, setup_context=_setup_context)
torch.library.custom_op(
    "gft::row_loss_", _row_loss_, mutates_args={"logits"}, schema=f"(Tensor(a!) logits, {_ARGUMENTS}) -> ({_PER_ROW})"
).register_fake(_fake_per_row)
_SCALE = "gradient, Tensor row_scale, Tensor upstream, str backend"
torch.library.custom_op(
    "gft::scale", _scale, mutates_args=(), schema=f"(Tensor {_SCALE}, ScalarType? dtype=None) -> Tensor"
).register_fake(
    lambda gradient, row_scale, upstream, backend, dtype=None: gradient_for(gradient, inplace=False, dtype=dtype)
)
torch.library.custom_op(
    "gft::scale_", _scale_, mutates_args={"gradient"}, schema=f"(Tensor(a!) {_SCALE}) -> ()"
).register_fake(lambda gradient, row_scale, upstream, backend: None)
