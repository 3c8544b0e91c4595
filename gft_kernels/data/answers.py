"""Verifiers of answers, usable as rewards: 1 for a completion whose answer is the column `answer`'s, else 0.

The column may hold numbers, text or JSON; what is asked of a completion beside its answer differs.
"""

from __future__ import annotations

import json
import re
import threading
from decimal import Decimal, InvalidOperation

from torch import Tensor

from gft_kernels.data.fields import plain
from gft_kernels.data.readers import fields_once

# A sign (also a minus or a dash of print, and before a currency), and digits.
NUMBER = re.compile(r"([-\u2212\u2013]?)(?:\\?[$€£¥])?((?:\d+(?:,\d+)*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?)")
THOUSANDS = re.compile(r"(?<=\d)[, ](?=(?:\d\d\d?[, ])*\d{3}(?![, ]?\d))")  # or 1,2 would be 12
SPACE = re.compile(r"(?<!\d) +| +(?!\d)")  # not that of 1 2

NO_MATH_VERIFY = "math_verify must be installed for this reward, got none; run pip install 'gft-kernels[math]'."


def last_number(prompts, completions, answer, **columns) -> list[float]:
    """1 where the last number of the completion equals the last number of `answer` (GSM8K's "#### 72"), else 0.

    Numbers are decimal: the last one of 1/2 or 10^2 is 2.
    """
    return [
        float((found := read_number(text)) is not None and found == read_number(as_text(gold)))
        for text, gold in zip(completions, answer, strict=True)
    ]


def boxed_answer(prompts, completions, answer, **columns) -> list[float]:
    r"""1 where the last \boxed{...} of the completion equals `answer` as text or as a number, else 0."""
    return [float(_same_answer(last_boxed(c), as_text(gold))) for c, gold in zip(completions, answer, strict=True)]


def exact_answer(prompts, completions, answer, **columns) -> list[float]:
    """1 where the completion is `answer` and nothing else, white space around it aside, else 0."""
    return [float(text.strip() == as_text(gold).strip()) for text, gold in zip(completions, answer, strict=True)]


def json_answer(prompts, completions, answer, **columns) -> list[float]:
    """1 where the completion is one JSON value equal to `answer` and nothing else, fields in any order, else 0.

    Types count: 34, 34.0 and "34" differ. `answer` is a value, or one as JSON text. Raises: ValueError for other text.
    """
    golds = [canonical(gold if isinstance(gold, str) else json.dumps(plain(gold))) for gold in answer]
    if None in golds:
        raise ValueError(f"field `answer` must be JSON, got {answer[golds.index(None)]!r:.60}")
    return [float(canonical(text) == gold) for text, gold in zip(completions, golds, strict=True)]


def math_verify(prompts, completions, answer, **columns) -> list[float]:
    """1 where the library math-verify judges the completion equal to `answer`, else 0. Needs the extra `math`.

    An `answer` without marks of mathematics ($, \\boxed) is a formula as a whole.
    """
    try:
        from math_verify import parse, verify
    except ImportError:
        raise ImportError(NO_MATH_VERIFY) from None
    # Its timeouts use SIGALRM, which only the main thread may set.
    seconds = 5 if threading.current_thread() is threading.main_thread() else None
    golds = [parse(_marked(as_text(gold)), parsing_timeout=seconds) for gold in answer]
    found = [parse(text, parsing_timeout=seconds) for text in completions]
    return [float(verify(g, f, timeout_seconds=seconds)) for g, f in zip(golds, found, strict=True)]


def as_text(gold: object) -> str:
    """An `answer` as it would be written, also where a dataset holds it in a tensor."""
    return str(gold.cpu().numpy() if isinstance(gold, Tensor) else gold)


def _marked(gold: str) -> str:
    """math-verify looks for a formula between marks, or else for a number alone: 2 in 2\\sqrt{3}."""
    return gold if any(mark in gold for mark in ("$", "\\(", "\\[", "\\boxed")) else f"\\boxed{{{gold}}}"


def read_number(text: str) -> Decimal | None:
    """The last number in a text, thousands separators removed; None without one, and where commas are none (1,2)."""
    numbers = NUMBER.findall(text)
    if not numbers:
        return None
    sign, digits = numbers[-1]
    try:
        return Decimal(("-" if sign else "") + THOUSANDS.sub("", digits))
    except InvalidOperation:
        return None


def canonical(text: str) -> str | None:
    """The one spelling of a JSON value, by which two texts of it are compared; None for what is none."""
    try:
        return json.dumps(json.loads(text, object_pairs_hook=fields_once), sort_keys=True, allow_nan=False)
    except (ValueError, RecursionError):
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
    found, gold = (SPACE.sub("", THOUSANDS.sub("", s.strip().strip("$"))) for s in (found, gold))
    try:
        return found == gold or ("_" not in found + gold and Decimal(found) == Decimal(gold))  # it reads 24_7 as 247
    except InvalidOperation:
        return False
