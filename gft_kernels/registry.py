"""Which backend serves a call: the named one, or the first of `ORDER` that does not refuse."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from gft_kernels.options import BackendUnavailable, RowCall

ORDER = ("cuda", "triton", "cpu", "reference")


@cache
def backend(name: str) -> ModuleType:
    """The backend's module, imported on first use."""
    return import_module(f"gft_kernels.backends.{name}")


def choose(name: str, call: RowCall) -> Any:
    """The backend that serves `call`. Raises BackendUnavailable if a named one cannot."""
    if name == "auto":
        return next(module for module in map(backend, ORDER) if refusal(module, call) is None)
    module = backend(name)
    reason = refusal(module, call)
    if reason is not None:
        raise BackendUnavailable(f"backend must be able to serve the call, got {name!r}: {reason}; try backend='auto'")
    return module


def refusal(module: ModuleType, call: RowCall) -> str | None:
    """Why a backend cannot serve a call: not on this machine, or not this call."""
    return module.absent() or module.refuses(call)
