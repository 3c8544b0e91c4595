"""F1 to F7 and the family as Triton functions: the text of formulas.py and surrogates.py, compiled a second time.

Those functions use a handful of free names (exp, log, where, ...). Here the same code objects get a dictionary that
binds the names to Triton's operations, so there is no second copy of the mathematics to keep in step.
"""

from types import FunctionType
from typing import NamedTuple

import triton
import triton.language as tl

from gft_kernels import formulas, surrogates
from gft_kernels.options import RECTIFY, SURROGATES

NEG_INF = tl.constexpr(float("-inf"))
# Triton offers expm1, log1p and tanh only in a vendor's library, so they are formed here from exp and log.


@triton.jit
def exp(x):
    return tl.exp(x)


@triton.jit
def log(x):
    return tl.log(x)


@triton.jit
def log1p(x):
    """log(1 + x), up to x = 1 as 2·artanh(x / (2 + x)) in nine terms (relative error 2e-10); else nothing cancels."""
    s = x / (2.0 + x)
    square = s * s
    series = 1.0 / 15.0 + square * (1.0 / 17.0)
    series = 1.0 / 13.0 + square * series
    series = 1.0 / 11.0 + square * series
    series = 1.0 / 9.0 + square * series
    series = 1.0 / 7.0 + square * series
    series = 1.0 / 5.0 + square * series
    series = 1.0 / 3.0 + square * series
    series = 2.0 * (s + s * square * series)
    return tl.where((x > -0.5) & (x <= 1.0), series, tl.log(1.0 + x))


@triton.jit
def abs(x):
    return tl.abs(x)


@triton.jit
def maximum(a, b):
    return tl.maximum(a, b)


@triton.jit
def where(condition, a, b):
    return tl.where(condition, a, b)


@triton.jit
def expm1(x):
    """e^x - 1. Up to |x| = 0.35 the Taylor series to x^9 (relative error 2e-9 there), above it nothing cancels."""
    series = 1.0 / 40320.0 + x * (1.0 / 362880.0)
    series = 1.0 / 5040.0 + x * series
    series = 1.0 / 720.0 + x * series
    series = 1.0 / 120.0 + x * series
    series = 1.0 / 24.0 + x * series
    series = 1.0 / 6.0 + x * series
    series = 0.5 + x * series
    series = x + x * x * series
    return tl.where(tl.abs(x) < 0.35, series, tl.exp(x) - 1.0)


@triton.jit
def tanh(x):
    """Within about 1e-7: near 0 an odd polynomial (that of Cephes' tanhf, S. Moshier), else 1 - 2e / (1 + e)."""
    square = x * x
    series = 2.06390887954e-2 + square * -5.70498872745e-3
    series = -5.37397155531e-2 + square * series
    series = 1.33314422036e-1 + square * series
    series = -3.33332819422e-1 + square * series
    series = x + x * square * series
    decay = tl.exp(-2.0 * tl.abs(x))  # in (0, 1]: cannot overflow
    size = 1.0 - 2.0 * decay / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.625, series, tl.where(x < 0.0, -size, size))


# Surrogates by their place, as the kernels are given them: run-time values, so none is compiled of its own.
_PLACES = {name.upper(): tl.constexpr(place) for names in (SURROGATES, RECTIFY) for place, name in enumerate(names)}
# tl: Triton's interpreter looks it up in every function's globals.
_NAMES = {
    "__name__": __name__,
    "tl": tl,
    "NEG_INF": NEG_INF,
    "NAN": tl.constexpr(float("nan")),
    **_PLACES,
    **{f.__name__: f for f in (abs, exp, expm1, log, log1p, maximum, tanh, where)},
}


def _in_triton(function):
    """The same code object with Triton's operations for its free names; later functions may call it."""
    compiled = triton.jit(FunctionType(function.__code__, _NAMES, function.__name__))
    _NAMES[function.__name__] = compiled
    return compiled


transform = _in_triton(formulas.transform)
transform_slope = _in_triton(formulas.transform_slope)
merge = _in_triton(formulas.merge)  # F2
raise_gap = _in_triton(formulas.raise_gap)
observe = _in_triton(formulas.observe)  # F1
log_prob = _in_triton(formulas.log_prob)  # F3
row_tau = _in_triton(formulas.row_tau)
coefficient = _in_triton(formulas.coefficient)  # F4
shaped_prob = _in_triton(formulas.shaped_prob)
rectified_coefficient = _in_triton(formulas.rectified_coefficient)
shaped_coefficient = _in_triton(formulas.shaped_coefficient)
uncertainty = _in_triton(formulas.uncertainty)
entropy_coefficient = _in_triton(formulas.entropy_coefficient)
group_advantage = _in_triton(formulas.group_advantage)  # F5
log_ratio = _in_triton(formulas.log_ratio)
is_clipped = _in_triton(formulas.is_clipped)
clipped_coefficient = _in_triton(formulas.clipped_coefficient)
clipped_loss = _in_triton(formulas.clipped_loss)
capped_coefficient = _in_triton(formulas.capped_coefficient)
gated_coefficient = _in_triton(formulas.gated_coefficient)
gated_loss = _in_triton(formulas.gated_loss)
kl_kappa = _in_triton(formulas.kl_kappa)
kl_loss = _in_triton(formulas.kl_loss)
kappa = _in_triton(formulas.kappa)
token_loss = _in_triton(formulas.token_loss)  # F6
surrogate_terms = _in_triton(surrogates.surrogate_terms)
weighed = _in_triton(formulas.weighed)
dlogit_other = _in_triton(formulas.dlogit_other)  # F7
dlogit_target = _in_triton(formulas.dlogit_target)  # F7
dlogit_tilted = _in_triton(formulas.dlogit_tilted)
row_size = _in_triton(formulas.row_size)
entropy = _in_triton(formulas.entropy)


class Transform(NamedTuple):
    """How a stored logit becomes the one the loss sees; without a softcap (0) the scale is divided by T already."""

    logit_scale: tl.tensor
    temperature: tl.tensor
    SOFTCAP: tl.constexpr


@triton.jit
def seen(x, t):
    """`transform`, a multiplication where there is no softcap; t is a `Transform` or has its fields."""
    if t.SOFTCAP == 0.0:
        return transform(x, t.logit_scale, 0.0, 1.0)
    else:
        return transform(x, t.logit_scale, t.SOFTCAP, t.temperature)


@triton.jit
def seen_slope(x, t):
    """`transform_slope`, for t as in `seen`."""
    if t.SOFTCAP == 0.0:
        return transform_slope(x, t.logit_scale, 0.0, 1.0)
    else:
        return transform_slope(x, t.logit_scale, t.SOFTCAP, t.temperature)
