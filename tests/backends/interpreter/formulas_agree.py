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
def evaluate(
    inputs, first, second, function: tl.constexpr, number, CAP: tl.constexpr, ARITY: tl.constexpr, FLAG: tl.constexpr,
    PAIR: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """ARITY 0: a softcap, a compile-time value, stands third; -1: an estimator, the same for all rows. FLAG: a bool."""
    at = tl.arange(0, N)
    a = tl.load(inputs + at)
    b = tl.load(inputs + N + at)
    c = tl.load(inputs + 2 * N + at)
    d = tl.load(inputs + 3 * N + at)
    e = tl.load(inputs + 4 * N + at)
    if FLAG == 3:
        c = c != 0.0
    if FLAG == 4:
        d = d != 0.0
    if ARITY == 0:
        value = function(a, b, CAP, d) + tl.zeros((N,), tl.float32)
    elif ARITY == -1:
        value = function(a, b, number)
    elif ARITY == 1:
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


FLAGS = {"row_tau": 3, "rectified_coefficient": 4}  # which of a formula's arguments is a bool
LAUNCHES = {"transform": (0, (0.0, 30.0)), "transform_slope": (0, (0.0, 30.0))}  # a third argument of a launch
LAUNCHES |= dict.fromkeys(("kl_loss", "kl_kappa"), (-1, (1, 2, 3)))


def in_triton(name: str, columns: torch.Tensor) -> list[torch.Tensor]:
    """A formula over padded columns (5, N), by a kernel."""
    n, pair = columns.shape[1], name in ("merge", "observe")
    out = torch.empty(2, n)
    arity, thirds = LAUNCHES.get(name, (len(GRIDS[name][0]), (None,)))
    for third in thirds:
        first, second = torch.empty(2, n)
        cap, number = (third, 0) if arity == 0 else (0.0, third or 0)
        evaluate[(1,)](
            columns, first, second, function=getattr(compiled, name), number=number, CAP=cap, ARITY=arity,
            FLAG=FLAGS.get(name, 0), PAIR=pair, N=n,
        )  # fmt: skip
        chosen = slice(None) if third is None else columns[2] == third
        out[:, chosen] = torch.stack([first, second])[:, chosen]
    return list(out) if pair else [out[0]]


def in_torch(name: str, columns: torch.Tensor) -> list[torch.Tensor]:
    """The same by torch, in float32 too: at pi = tau the last bit of log tau decides."""
    function, arity = getattr(formulas, name), len(GRIDS[name][0])
    rows = []
    for point in columns.T:
        arguments = list(point[:arity])
        if name.startswith("transform"):
            arguments[2] = float(arguments[2])
        if name in FLAGS:
            arguments[FLAGS[name] - 1] = bool(arguments[FLAGS[name] - 1])
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
