"""Which backend serves a call: the named one, or the first of `ORDER` that does not refuse.

One module per way to compute a `RowCall`; each has `absent()`, `refuses(call)`, `run(call)` and `scale(...)`.

- `absent() -> str | None`: why this machine cannot use the backend at all; None: ready.
- `refuses(call: RowCall) -> str | None`: why this call cannot be served; None: it can.
- `run(call: RowCall) -> RowResult`.
- `scale(gradient_STV, row_scale_R, upstream, inplace, dtype=None) -> Tensor`: the backward's one multiplication,
  rounded once; to another dtype than a float32 gradient's own, where that is asked for and not in place.

For logits sharded over the vocabulary (distributed.py), with a collective between the two:
- `shard_statistics(call, columns_R, read_R) -> ShardStatistics`: this shard's state without the target; `columns_R`,
  int64, is the target's column here, or anything outside [0, V), and then its logit is given as 0. Rows that `read_R`,
  bool, leaves out are not read and give the neutral state (-inf, 0).
- `shard_gradient(call, columns_R, agreed: AgreedRows) -> Tensor`: F7 on this shard, from numbers of the whole rows.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from gft_kernels.options import BackendUnavailable, RowCall

ORDER = ("cuda", "triton", "cpu", "reference")


@cache
def named(name: str) -> ModuleType:
    """The backend's module, imported on first use."""
    return import_module(f"gft_kernels.backends.{name}")


def choose(name: str, call: RowCall) -> Any:
    """The backend that serves `call`. Raises BackendUnavailable if a named one cannot."""
    if name == "auto":
        return next(module for module in map(named, ORDER) if refusal(module, call) is None)
    module = named(name)
    reason = refusal(module, call)
    if reason is not None:
        raise BackendUnavailable(f"backend must be able to serve the call, got {name!r}: {reason}; try backend='auto'")
    return module


def refusal(module: ModuleType, call: RowCall) -> str | None:
    """Why a backend cannot serve a call: not on this machine, or not this call."""
    return module.absent() or module.refuses(call)
