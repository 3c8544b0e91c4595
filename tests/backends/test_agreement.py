"""One mathematics, two texts: the C++ formulas (csrc/gft/formulas.h) and the Python ones, each tag on an edge grid."""

from __future__ import annotations

import inspect
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from backends.formula_grid import GRID

from gft_kernels import _extension, formulas, options
from gft_kernels.backends import cpu, reference, triton

if (absence := _extension.absent()) is not None:
    pytest.skip(absence, allow_module_level=True)

PRECISIONS = {"formulas64": (torch.float64, 1e-14), "formulas32": (torch.float32, 3e-6)}


def evaluate_python(name: str, arguments: tuple, dtype: torch.dtype) -> tuple[float, ...]:
    """The Python text on one point; options that choose a branch (softcap, booleans) stay plain numbers."""
    plain = {"softcap", "rectify_all", "logit_scale", "temperature", "estimator"}
    function = getattr(formulas, name)
    parameters = inspect.signature(function).parameters
    given = [
        x if isinstance(x, bool) or parameter in plain else torch.tensor(x, dtype=dtype)
        for parameter, x in zip(parameters, arguments, strict=True)
    ]
    out = function(*given)
    return tuple(float(x) for x in (out if isinstance(out, tuple) else (out,)))


def close(a: float, b: float, tolerance: float) -> bool:
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) and math.isnan(b)
    return a == b or abs(a - b) <= tolerance * max(abs(a), abs(b), 1e-30)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", GRID)
def test_texts_agree(name, precision):
    dtype, tolerance = PRECISIONS[precision]
    native = getattr(getattr(_extension.kernels(), precision), name)
    for arguments in itertools.product(*GRID[name]):
        ours = evaluate_python(name, arguments, dtype)
        theirs = native(*arguments)
        theirs = theirs if isinstance(theirs, tuple) else (theirs,)
        agree = all(close(a, b, tolerance) for a, b in zip(ours, theirs, strict=True))
        assert agree, f"{name}{arguments}: Python {ours}, C++ {theirs}"


def test_every_formula_is_held():
    """A formula added to one text must appear in the other and in the grid."""
    python = {name for name, f in inspect.getmembers(formulas, inspect.isfunction) if f.__module__ == formulas.__name__}
    native = {name for name in vars(_extension.kernels().formulas64) if not name.startswith("__")}
    assert python == native == set(GRID)


NAMES = {"Reduction": "REDUCTIONS", "Normalize": "NORMALIZE", "Singleton": "SINGLETON", "Rectify": "RECTIFY",
         "Surrogate": "SURROGATES"}  # fmt: skip


@pytest.mark.parametrize("enum", NAMES)
def test_names_are_numbers_in_the_same_order(enum):
    """Python's tuple, the enumerators and the names at the border: a number past the last one is nobody's."""
    names, root = getattr(options, NAMES[enum]), Path(__file__).parents[2]
    enumerators = re.search(rf"enum class {enum} : int {{ (.*) }};", (root / "csrc/gft/args.h").read_text())[1]
    assert tuple(enumerators.split(", ")) == tuple(name.replace("-", "_") for name in names)
    table = "kSurrogates" if enum == "Surrogate" else rf"k{enum}s?"
    spelled = re.search(rf"{table}{{(.*)}};", (root / "python_api/module.cpp").read_text())[1]
    assert tuple(re.findall(r'"(.*?)"', spelled)) == names


def test_a_surrogate_without_a_number_crosses_no_border():
    objective = options.Objective("ppo")
    credit = options.Credit(torch.tensor([1]), advantages_R=torch.ones(1))
    with pytest.raises(ValueError, match=r"surrogate must be one of gft, grpo, .*, got 'ppo'"):
        cpu.run(options.RowCall(torch.zeros(1, 1, 3), credit, objective))
    with pytest.raises(ValueError):
        triton._objective(objective)


@pytest.mark.parametrize("place", ["the objective's", "the given rows'"])
def test_a_surrogate_that_nobody_knows_is_an_error(place):
    row, objective = torch.full((1,), -0.3), options.Objective("ppo2")
    if place == "the given rows'":
        objective = options.Objective(given=options.Rule("ppo2"), given_R=torch.tensor([True]))
    with pytest.raises(ValueError, match=r"surrogate must be one of gft, .* got 'ppo2'; see surrogates\.py"):
        reference.row_terms(objective, row, row, row)
