"""Every formula in both Python texts: torch on the CPU, and the kernels' own functions in Triton's interpreter.

They are one text with two sets of primitives (exp, expm1, log1p, tanh, ...), so what can differ is a primitive.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl
from backends.formula_grid import GRID

from gft_kernels import formulas
from gft_kernels.triton_kernels import formulas as compiled

GRIDS = {name: list(itertools.product(*values)) for name, values in GRID.items()}


@triton.jit
def evaluate(inputs, first, second, function: tl.constexpr, ARITY: tl.constexpr, PAIR: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    a = tl.load(inputs + at)
    b = tl.load(inputs + N + at)
    c = tl.load(inputs + 2 * N + at)
    d = tl.load(inputs + 3 * N + at)
    e = tl.load(inputs + 4 * N + at)
    if ARITY == 1:
        value = function(a)
    elif ARITY == 2:
        value = function(a, b)
    elif ARITY == 3:
        value = function(a, b, c)
    elif ARITY == 4:
        value = function(a, b, c, d)
    else:
        value = function(a, b, c, d, e)
    if PAIR:
        tl.store(first + at, value[0])
        tl.store(second + at, value[1])
    else:
        tl.store(first + at, value)


@triton.jit
def evaluate_softcap(inputs, first, function: tl.constexpr, SOFTCAP: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    x, scale, temperature = tl.load(inputs + at), tl.load(inputs + N + at), tl.load(inputs + 3 * N + at)
    tl.store(first + at, function(x, scale, SOFTCAP, temperature) + tl.zeros((N,), tl.float32))


@triton.jit
def evaluate_row_tau(inputs, first, function: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(first + at, function(tl.load(inputs + at), tl.load(inputs + N + at), tl.load(inputs + 2 * N + at) != 0.0))


@triton.jit
def evaluate_rectified(inputs, first, function: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    log_pi, advantage, tau = tl.load(inputs + at), tl.load(inputs + N + at), tl.load(inputs + 2 * N + at)
    everywhere, gamma = tl.load(inputs + 3 * N + at) != 0.0, tl.load(inputs + 4 * N + at)
    tl.store(first + at, function(log_pi, advantage, tau, everywhere, gamma))


@triton.jit
def evaluate_penalty(inputs, first, function: tl.constexpr, estimator, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(first + at, function(tl.load(inputs + at), tl.load(inputs + N + at), estimator))


def in_triton(name: str, columns: torch.Tensor) -> list[torch.Tensor]:
    """A formula over padded columns (5, N), by a kernel."""
    n = columns.shape[1]
    first, second = torch.empty(n), torch.empty(n)
    function = getattr(compiled, name)
    if name.startswith("transform"):
        for cap in (0.0, 30.0):  # a compile-time value, so one launch for each
            out = torch.empty(n)
            evaluate_softcap[(1,)](columns, out, function=function, SOFTCAP=cap, N=n)
            first[columns[2] == cap] = out[columns[2] == cap]
        return [first]
    if name.startswith("kl_"):
        for estimator in (1, 2, 3):  # a choice for all rows of a launch
            out = torch.empty(n)
            evaluate_penalty[(1,)](columns, out, function=function, estimator=estimator, N=n)
            first[columns[2] == estimator] = out[columns[2] == estimator]
        return [first]
    of_a_flag = {"row_tau": evaluate_row_tau, "rectified_coefficient": evaluate_rectified}
    if name in of_a_flag:
        of_a_flag[name][(1,)](columns, first, function=function, N=n)
        return [first]
    pair = name in ("merge", "observe")
    arity = len(GRIDS[name][0])
    evaluate[(1,)](columns, first, second, function=function, ARITY=arity, PAIR=pair, N=n)
    return [first, second] if pair else [first]


def in_torch(name: str, columns: torch.Tensor) -> list[torch.Tensor]:
    """The same by torch, in float32 too: at pi = tau the last bit of log tau decides."""
    function, arity = getattr(formulas, name), len(GRIDS[name][0])
    rows = []
    for point in columns.T:
        arguments = list(point[:arity])
        if name.startswith("transform"):
            arguments[2] = float(arguments[2])
        if name in ("row_tau", "rectified_coefficient"):
            at = {"row_tau": 2}.get(name, 3)
            arguments[at] = bool(arguments[at])
        value = function(*arguments)
        rows.append(
            torch.stack([torch.as_tensor(v).float() for v in (value if isinstance(value, tuple) else (value,))])
        )
    return list(torch.stack(rows, 1))


@pytest.mark.parametrize("name", GRIDS)
def test_both_texts_agree(name):
    points = GRIDS[name]
    n = 1 << (len(points) - 1).bit_length()  # Triton's blocks are powers of two
    columns = torch.ones(5, n)
    columns[: len(points[0])] = torch.tensor([*points, *[points[-1]] * (n - len(points))]).T
    results = in_triton(name, columns), in_torch(name, columns)
    for first, *second in results:  # a state's mass tells NaN: a GPU's maximum drops it, and Triton 3.8 interprets so
        if second:
            first[second[0].isnan()] = torch.nan
    for ours, truth in zip(*results, strict=True):
        # 1e-30: float32 results below it are subnormal in some factor
        torch.testing.assert_close(ours, truth, rtol=1.5e-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("name", ["exp", "expm1", "log1p", "tanh"])
def test_primitives(name):
    x = {"log1p": torch.linspace(-0.999, 3.0, 4096), "expm1": torch.linspace(-20.0, 2.0, 4096)}.get(
        name, torch.linspace(-9.0, 9.0, 4096)
    )
    out = torch.empty_like(x)
    evaluate_primitive[(1,)](x, out, function=getattr(compiled, name), N=4096)
    truth = getattr(torch, name)(x.double())
    assert ((out.double() - truth).abs() <= 4e-7 * truth.abs()).all()


@triton.jit
def evaluate_primitive(x, out, function: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, function(tl.load(x + at)))
