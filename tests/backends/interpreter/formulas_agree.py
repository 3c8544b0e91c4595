"""Every formula in both Python texts: torch on the CPU, and the kernels' own functions in Triton's interpreter.

They are one text with two sets of primitives (exp, expm1, log1p, tanh, ...), so what can differ is a primitive.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl

from gft_kernels import formulas
from gft_kernels.triton_kernels import formulas as compiled

INF = float("inf")
LOG_PI = [0.0, -1e-38, -1e-7, -1e-3, -0.1, -0.34, -0.36, -0.6931472, -1.0, -5.0, -87.0, -1e4, -INF, float("nan")]
LOGIT = [0.0, -0.0, 1e-38, 1e-4, 0.3, -0.3, 0.7, -2.0, 9.0, -60.0, 1e4, -1e30, INF, -INF, float("nan")]
MASS = [0.0, 1e-38, 1e-7, 0.5, 1.0, 1.0000001, 3.0, 1e5]
SCALE = [0.0, -0.0, 1.0, -0.25, 1e-38, 3e4, float("nan")]
STATES = [(-INF, 0.0), (-3.0, 1e-7), (0.0, 1.0), (2.5, 7.0), (1e4, 1.0), (INF, 1.0)]
MERGES = [(*a, *b) for a, b in itertools.product(STATES, STATES)]

RATIO = [0.0, 0.5, 0.75, 1.0, 1.25, 1.5, 1e30, INF, float("nan")]
CLIPS = list(itertools.product(RATIO, (0.0, 2.0, -2.0, float("nan")), (0.0, 0.25), (0.0, 0.25), (1.5, INF)))
GATED = list(itertools.product(RATIO, (0.0, 2.0, -2.0, float("nan")), (1.0, 0.1), (1.05, 9.0)))
GAMMA = (0.0, 1e-6, 0.1, 30.0)
LOG_RATIO = [0.0, 1e-2, -0.3, 2.0, 80.0, 200.0, -200.0, INF, -INF, float("nan")]
CAPPED = list(itertools.product(LOG_RATIO, (2.0, 20.0, INF)))
GRIDS = {
    "transform": [(x, a, c, t) for x in LOGIT for a in (1.0, 0.0625) for c in (0.0, 30.0) for t in (1.0, 0.6)],
    "transform_slope": [(x, a, c, t) for x in LOGIT for a in (1.0, 0.0625) for c in (0.0, 30.0) for t in (1.0, 0.6)],
    "observe": [(*state, z) for state in STATES for z in LOGIT],
    "merge": MERGES,
    "raise_gap": [(g, m, d) for g in (0.0, -0.5) for m in (0.0, 1.0, 4.0) for d in (0.0, -0.3, -200.0, -INF)],
    "log_prob": [(z, *state) for z in LOGIT for state in STATES],
    "row_tau": [(a, t, r) for a in (-1.0, 0.0, 1.0) for t in (0.0, 0.7) for r in (0.0, 1.0)],
    "coefficient": [(x, t) for x in LOG_PI for t in (0.0, 0.5, 0.7, 1.0)],
    "shaped_prob": list(itertools.product(LOG_PI, GAMMA)),
    "rectified_coefficient": list(itertools.product(LOG_PI, (-1.0, 0.0, 1.0), (0.0, 0.7), (0.0, 1.0), GAMMA)),
    "shaped_coefficient": list(itertools.product(LOG_PI, GAMMA)),
    "uncertainty": [(x,) for x in LOG_PI],
    "entropy_coefficient": list(itertools.product((0.0, 0.5, 2.9957, 11.9, float("nan")), (1.0, 0.5, 3.0))),
    "group_advantage": [(r, 0.5, s, 1e-6) for r in (0.5, 0.4999999, 1.0, -2.0) for s in (0.0, 0.3)],
    "log_ratio": list(itertools.product(LOG_PI, LOG_PI)),
    "is_clipped": CLIPS,
    "clipped_coefficient": CLIPS,
    "clipped_loss": CLIPS,
    "capped_coefficient": list(itertools.product(RATIO, (0.0, 0.25, 1.0), (0.0, 0.25, 4.0))),
    "gated_coefficient": GATED,
    "gated_loss": GATED,
    "kl_loss": CAPPED,
    "kl_kappa": CAPPED,
    "kappa": list(itertools.product([0.0, -1.5, 2.0, float("nan")], [0.0, 1e-38, 1.0, float("nan")])),
    "token_loss": list(itertools.product(LOG_PI, SCALE)),
    "weighed": list(itertools.product(SCALE, (0.0, 2.0, INF, float("nan")))),
    "dlogit_other": list(itertools.product(LOG_PI, SCALE)),
    "dlogit_target": list(itertools.product(LOG_PI, SCALE)),
    "dlogit_tilted": list(itertools.product(LOG_PI, SCALE, (0.0, 0.3, float("nan")), (0.0, 11.9))),
    "row_size": list(itertools.product(SCALE, SCALE, (0.0, 11.9, float("nan")))),
    "entropy": list(itertools.product([0.0, 0.1, 12.0], [0.0, -0.5, -12.0])),
}


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
    for ours, truth in zip(in_triton(name, columns), in_torch(name, columns), strict=True):
        # 1e-30: float32 results below it are subnormal in some factor
        torch.testing.assert_close(ours, truth, rtol=1.5e-6, atol=1e-30, equal_nan=True)


def test_every_formula_has_a_grid():
    public = {n for n, f in vars(formulas).items() if callable(f) and getattr(f, "__module__", "") == formulas.__name__}
    assert public == set(GRIDS)


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
