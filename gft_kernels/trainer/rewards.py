"""Reward functions: finding one by name, what it takes, and calling them all on a step's responses.

A reward function is `f(prompts, completions, **columns) -> list[float | None]`: one number per completion, None where
it does not apply. Every other column of the row arrives under its name, one entry per completion.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import math
import pkgutil
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from gft_kernels.checks import WHOLE
from gft_kernels.data.answers import (
    NO_MATH_VERIFY,
    boxed_answer,
    exact_answer,
    json_answer,
    last_number,
    math_verify,
)
from gft_kernels.data.fields import plain
from gft_kernels.data.rows import OWN_FIELDS, Row

LARGEST = torch.finfo(torch.float32).max
ANSWERS = (last_number, boxed_answer, exact_answer, json_answer, math_verify)
READY: dict[str, Callable] = {f.__name__: f for f in ANSWERS}
WRAPPER = """
    def reward(prompts, completions, **columns):
        texts = tokenizer([p + c for p, c in zip(prompts, completions)], padding=True, return_tensors="pt")
        return model(**texts).logits[:, 0].tolist()"""


class RewardError(RuntimeError):
    """A reward function failed on a response; the message names the function, the row and the failure."""


def find(path: str, what: str = "reward function") -> Callable:
    """A callable by name: a ready reward, "package.module:name" or "package.module.name".

    Raises: ValueError if the module or the name does not exist, or it is not callable.
    """
    if path in READY:
        return READY[path]
    if "/" in path:
        raise ValueError(f"{what} must be a function, got {path!r}; where that is a model, wrap it: {WRAPPER}")
    module, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    if not module:
        raise ValueError(f"{what} must be one of {', '.join(READY)} or a dotted path, got {path!r}.")
    try:
        found = pkgutil.resolve_name(f"{module}:{name}")
    except AttributeError:
        raise ValueError(f"{what} must exist, got {path!r}; module {module} has no {name!r}.") from None
    except (Exception, SystemExit) as error:  # whatever the module does when it is imported
        raise ValueError(f"{what} must be importable, got {path!r}; {type(error).__name__}: {error}.") from error
    if not callable(found):
        raise ValueError(f"{what} must be callable, got {path!r}, which is a {type(found).__name__}.")
    return found


class Reward:
    """One reward function: its name, the columns it cannot do without, and its values for a batch.

    Raises: ValueError, TypeError for a function that could not be called as rewards are.
    """

    def __init__(self, function: Callable | str):
        if isinstance(function, str):
            function = find(function)
        if isinstance(function, nn.Module):
            raise TypeError(
                f"reward function must be a function, got the model {name_of(function)}; wrap it: {WRAPPER}"
            )
        if not callable(function):
            raise TypeError(f"reward function must be a function or a name, got {function!r}.")
        if inside(function) is math_verify and importlib.util.find_spec("math_verify") is None:
            raise ValueError(NO_MATH_VERIFY)  # or the first rollout would be sampled for nothing
        self.function, self.name = function, name_of(function)
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None)):  # noqa: B004
            raise TypeError(f"reward function {self.name} must return numbers, got an async function; await inside it.")
        # A decorator passes on what it is given, but shows the signature of the function inside: both count.
        both = inspect.signature(function, follow_wrapped=False), inspect.signature(function)
        parameters = [list(signature.parameters.values()) for signature in both]
        self.takes = None  # every column
        for found in parameters:
            if not any(p.kind is p.VAR_KEYWORD for p in found):
                self.takes = {p.name for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        open_ended = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        needed = [p for p in parameters[1] if p.default is p.empty and p.kind not in open_ended]
        self._check({p.name for p in needed}, by_place=[p for p in needed if p.kind is p.POSITIONAL_ONLY])
        self.columns = {p.name for p in needed} - {"prompts", "completions"}

    def _check(self, needed: set[str], by_place: list) -> None:
        if by_place or (self.takes is not None and "completions" not in self.takes):
            raise TypeError(
                f"reward function {self.name} must take `completions` by name, got {self.name}"
                f"{inspect.signature(self.function, follow_wrapped=False)}; "
                "write it as f(prompts, completions, **columns)."
            )
        for name in OWN_FIELDS:
            if name in needed:
                hint = "it is called with `prompts`, one for each completion" if name == "prompt" else "it is no column"
                raise TypeError(f"reward function {self.name} must do without `{name}`, got a parameter; {hint}.")

    def __call__(self, rows: Sequence[Row], completions: Sequence[str]) -> list[float | None]:
        """A number per completion, None where the function does not apply. Raises RewardError."""
        try:
            values = self._values(rows, completions)
        except (Exception, SystemExit) as error:
            raise self._blame(rows, completions, error) from error
        values = values.tolist() if hasattr(values, "tolist") else values  # an array, a tensor
        if not isinstance(values, (list, tuple)) or len(values) != len(completions):
            got = len(values) if isinstance(values, (list, tuple)) else type(values).__name__
            raise RewardError(f"reward function {self.name} must return {len(completions)} values, got {got}.")
        return [self._number(*each) for each in zip(values, rows, completions, strict=True)]

    def _values(self, rows, completions):
        names = dict.fromkeys(key for row in rows for key in row.columns)
        given = {name: [row.columns.get(name) for row in rows] for name in names}
        given |= {"prompts": [row.prompt for row in rows], "completions": list(completions)}
        return self.function(**{name: v for name, v in given.items() if self.takes is None or name in self.takes})

    def _number(self, value, row, completion):
        if value is None:
            return None
        try:
            number = math.nan if isinstance(value, (str, bytes)) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not abs(number) <= LARGEST or (isinstance(plain(value), int) and abs(number) >= WHOLE):
            raise RewardError(
                f"{row.where}: reward function {self.name} must return finite numbers of float32, whole ones below "
                f"2^53, or None, got {value!r} for {excerpt(completion)}."
            )
        return number

    def _blame(self, rows, completions, error):
        """Find the row at fault by calling the function on one completion at a time."""
        place = "a whole batch, though no single row"
        for row, completion in zip(rows, completions, strict=True):
            try:
                self._values([row], [completion])
            except (Exception, SystemExit) as single:
                error, place = single, f"{row.where}, completion {excerpt(completion)}"
                break
        frame = traceback.extract_tb(error.__traceback__)[-1]
        what = f"raised {type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"
        return RewardError(f"reward function {self.name} {what} on {place}.")


class Rewards:
    """Several weighted reward functions, called on the responses of many rows at once."""

    def __init__(self, functions: Sequence[Callable | str] | Callable | str, weights: Sequence[float] | None = None):
        if callable(functions) or isinstance(functions, str):
            functions = [functions]
        self.functions = [Reward(function) for function in functions]
        self.weights = list(weights) if weights is not None else [1.0] * len(self.functions)
        if len(self.weights) != len(self.functions):
            raise ValueError(
                f"reward_weights must hold one weight per reward function, got {len(self.weights)} "
                f"for {len(self.functions)} functions."
            )
        names = [function.name for function in self.functions]  # two lambdas get two metrics
        earlier = [names[:i].count(name) for i, name in enumerate(names)]
        self.names = [f"{name}_{n + 1}" if n else name for name, n in zip(names, earlier, strict=True)]

    def __bool__(self):
        return bool(self.functions)

    def required_columns(self) -> set[str]:
        """The columns some function cannot do without: its parameters that have no default."""
        return set().union(*(function.columns for function in self.functions))

    def score(self, rows: Sequence[Row], completions: Sequence[str]) -> tuple[list[float], list[list[float | None]]]:
        """The weighted sum per completion, and each function's own values; rows[i] is completion i's row.

        Raises: RewardError if a function raises, returns the wrong count or a value that is not a finite number,
        or if no function applies to a completion.
        """
        parts = self.parts(rows, completions)
        totals = []
        for row, completion, *values in zip(rows, completions, *parts, strict=True):
            total = self.total(values)
            if total is None:
                raise RewardError(
                    f"{row.where}: no reward function applies; all returned None for {excerpt(completion)}."
                )
            totals.append(total)
        return totals, parts

    def parts(self, rows: Sequence[Row], completions: Sequence[str]) -> list[list[float | None]]:
        """Each function's own values. Raises RewardError as `score`, except where no function applies."""
        return [function(rows, completions) for function in self.functions]

    def total(self, values: Sequence[float | None]) -> float | None:
        """The weighted sum of a completion's values; None where no function applies."""
        terms = [w * value for w, value in zip(self.weights, values, strict=True) if value is not None]
        return math.fsum(terms) if terms else None


def name_of(function: Callable) -> str:
    """What a function is called in messages and metrics; of a partial, the function inside."""
    function = inside(function)
    return getattr(function, "__name__", type(function).__name__).strip("<>")


def inside(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def excerpt(text: str, width: int = 80) -> str:
    return repr(text if len(text) <= width else text[: width - 1] + "…")
