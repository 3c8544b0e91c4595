"""Reward functions: finding one by name, and calling them all on a step's responses.

A reward function is `f(prompts, completions, **columns) -> list[float | None]`: one number per completion, None where
it does not apply. Every other column of the row arrives under its name, one entry per completion.
"""

from __future__ import annotations

import importlib
import inspect
import math
import traceback
from collections.abc import Callable, Sequence

from gft_kernels.data.answers import boxed_answer, last_number, math_verify
from gft_kernels.data.rows import Row


class RewardError(RuntimeError):
    """A reward function failed on a response; the message names the function, the row and the failure."""


READY: dict[str, Callable] = {f.__name__: f for f in (last_number, boxed_answer, math_verify)}


def find(path: str, what: str = "reward function") -> Callable:
    """A callable by name: a ready reward, "package.module:name" or "package.module.name".

    Raises: ValueError if the module or the name does not exist, or it is not callable.
    """
    if path in READY:
        return READY[path]
    module, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    if not module:
        raise ValueError(f"{what} must be one of {', '.join(READY)} or a dotted path, got {path!r}.")
    try:
        found = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{what} must be importable, got {path!r}; {error}.") from None
    except AttributeError:
        raise ValueError(f"{what} must exist, got {path!r}; module {module} has no {name!r}.") from None
    if not callable(found):
        raise ValueError(f"{what} must be callable, got {path!r}, which is a {type(found).__name__}.")
    return found


class Rewards:
    """Several weighted reward functions, called on the responses of many rows at once."""

    def __init__(self, functions: Sequence[Callable | str] | Callable | str, weights: Sequence[float] | None = None):
        if callable(functions) or isinstance(functions, str):
            functions = [functions]
        self.functions = [find(f) if isinstance(f, str) else f for f in functions]
        self.weights = list(weights) if weights is not None else [1.0] * len(self.functions)
        if len(self.weights) != len(self.functions):
            raise ValueError(
                f"reward_weights must hold one weight per reward function, got {len(self.weights)} "
                f"for {len(self.functions)} functions."
            )
        self.names = [getattr(f, "__name__", type(f).__name__) for f in self.functions]

    def __bool__(self):
        return bool(self.functions)

    def required_columns(self) -> set[str]:
        """The columns some function cannot do without: its parameters that have no default."""
        required = set()
        for function in self.functions:
            for name, parameter in inspect.signature(function).parameters.items():
                if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
                    required.add(name)
        return required - {"prompts", "completions", "prompt"}

    def score(self, rows: Sequence[Row], completions: Sequence[str]) -> tuple[list[float], list[list[float | None]]]:
        """The weighted sum per completion, and each function's own values; rows[i] is completion i's row.

        Raises: RewardError if a function raises, returns the wrong count or a value that is not a finite number,
        or if no function applies to a completion.
        """
        parts = [self._call(f, name, rows, completions) for f, name in zip(self.functions, self.names, strict=True)]
        totals = []
        for i, row in enumerate(rows):
            applicable = [w * part[i] for w, part in zip(self.weights, parts, strict=True) if part[i] is not None]
            if not applicable:
                raise RewardError(
                    f"{row.where}: no reward function applies; all returned None for {_cut(completions[i])}."
                )
            totals.append(math.fsum(applicable))
        return totals, parts

    def _call(self, function, name, rows, completions):
        try:
            values = function(**_arguments(rows, completions))
        except Exception as error:
            raise self._blame(function, name, rows, completions, error) from error
        if not hasattr(values, "__len__") or len(values) != len(completions):
            got = len(values) if hasattr(values, "__len__") else type(values).__name__
            raise RewardError(f"reward function {name} must return {len(completions)} values, got {got}.")
        return [self._number(v, name, row, c) for v, row, c in zip(values, rows, completions, strict=True)]

    def _number(self, value, name, row, completion):
        if value is None:
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise RewardError(
                f"{row.where}: reward function {name} must return finite numbers or None, got {value!r} "
                f"for {_cut(completion)}."
            )
        return number

    def _blame(self, function, name, rows, completions, error):
        """Find the row at fault by calling the function on one completion at a time."""
        place = "a whole batch, though no single row"
        for row, completion in zip(rows, completions, strict=True):
            try:
                function(**_arguments([row], [completion]))
            except Exception as single:
                error, place = single, f"{row.where}, completion {_cut(completion)}"
                break
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return RewardError(
            f"reward function {name} raised {type(error).__name__}: {error} "
            f"({frame.filename}:{frame.lineno}) on {place}."
        )


def _arguments(rows, completions):
    names = dict.fromkeys(key for row in rows for key in row.columns)
    columns = {name: [row.columns.get(name) for row in rows] for name in names}
    return {"prompts": [row.prompt for row in rows], "completions": list(completions), **columns}


def _cut(text, width=80):
    return repr(text if len(text) <= width else text[: width - 1] + "…")
