"""Reward functions: ready ones, finding one by name, and calling them all on a step's responses.

A reward function is `f(prompts, completions, **columns) -> list[float | None]`: one number per completion, None where
it does not apply. Every other column of the row arrives under its name, one entry per completion.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
import threading
import traceback
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation

from gft_kernels.data.rows import Row

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


class RewardError(RuntimeError):
    """A reward function failed on a response; the message names the function, the row and the failure."""


def last_number(prompts, completions, answer, **columns) -> list[float]:
    """1 where the last number of the completion equals the last number of `answer` (GSM8K's "#### 72"), else 0."""
    return [
        float((found := read_number(text)) is not None and found == read_number(str(gold)))
        for text, gold in zip(completions, answer, strict=True)
    ]


def boxed_answer(prompts, completions, answer, **columns) -> list[float]:
    r"""1 where the last \boxed{...} of the completion equals `answer` as text or as a number, else 0."""
    return [float(_same_answer(last_boxed(c), str(gold))) for c, gold in zip(completions, answer, strict=True)]


def math_verify(prompts, completions, answer, **columns) -> list[float]:
    """1 where the library math-verify judges the completion equal to `answer`, else 0. Needs the extra `math`."""
    try:
        from math_verify import parse, verify
    except ImportError:
        raise ImportError(
            "math_verify must be installed for this reward; run pip install 'gft-kernels[math]'."
        ) from None
    # Its timeouts use SIGALRM, which only the main thread may set.
    seconds = 5 if threading.current_thread() is threading.main_thread() else None
    golds = [parse(str(gold), parsing_timeout=seconds) for gold in answer]
    found = [parse(text, parsing_timeout=seconds) for text in completions]
    return [float(verify(g, f, timeout_seconds=seconds)) for g, f in zip(golds, found, strict=True)]


def read_number(text: str) -> Decimal | None:
    """The last number in a text, thousands separators removed; None if there is none."""
    numbers = NUMBER.findall(text)
    try:
        return Decimal(numbers[-1].replace(",", "")) if numbers else None
    except InvalidOperation:
        return None


def last_boxed(text: str) -> str | None:
    r"""What the last \boxed{...} holds, braces balanced; None without one."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    begin, depth = start + len("\\boxed{"), 1
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin:position]
    return None


def _same_answer(found, gold):
    if found is None:
        return False
    gold = last_boxed(gold) or gold
    found, gold = (s.strip().strip("$").replace(",", "").replace(" ", "") for s in (found, gold))
    try:
        return Decimal(found) == Decimal(gold)
    except InvalidOperation:
        return found == gold


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
