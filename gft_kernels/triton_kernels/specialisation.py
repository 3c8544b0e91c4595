"""How a kernel is declared so that it is compiled once for all lengths, strides and addresses."""

import inspect

import triton


def compiled_once(function):
    """`triton.jit`, without the variants Triton makes for arguments equal to 1 or divisible by 16.

    Those would recompile a training step whenever a batch has a new remainder. The kernels find alignment themselves,
    at run time (spans.py). Integers carry an annotation, so that a value past 2^31 is no new type either.
    """
    names = [name for name, p in inspect.signature(function).parameters.items() if "constexpr" not in str(p.annotation)]
    return triton.jit(function, do_not_specialize=names, do_not_specialize_on_alignment=names)
