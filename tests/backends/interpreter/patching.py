"""Triton's interpreter patches triton.language once a launch, not once more for every call of a device function.

Each time it looks through all of the language, which is two thirds of what interpreting our kernels takes. What the
first call of a function patches stays patched, so the calls after it have nothing to look for.
"""

from __future__ import annotations

from triton.runtime.interpreter import InterpretedFunction


def patch_once() -> None:
    patching, patched = InterpretedFunction.__call__, set()

    def call(function, *args, **kwargs):
        if function.fn in patched:
            return function.rewrite()(*args, **kwargs)
        patched.add(function.fn)
        return patching(function, *args, **kwargs)

    InterpretedFunction.__call__ = call
