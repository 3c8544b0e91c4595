"""The sum of five digits modulo 10, worked out step by step: a task small enough to watch GFT learn on a CPU.

The base model knows general text (copy, reverse, sort, ...) and noisy solutions in mixed styles. The verifier is
strict: every step right, each operand once, the right answer. The expert works in a form the base hardly saw.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

from gft_kernels.data.readers import refuse_file

ALPHABET = "$>0123456789+=;#.ACRSMI[],"
DIGITS = 5
STYLES = {"direct": 0.20, "left": 0.40, "right": 0.20, "odd-even": 0.09, "ends": 0.09, "bracket": 0.02}
TEACHERS = ("right", "odd-even", "ends")


def query(rng: random.Random, digits: int = DIGITS) -> list[int]:
    return [rng.randrange(10) for _ in range(digits)]


def prompt_of(digits: Sequence[int]) -> str:
    return "A" + "+".join(map(str, digits)) + ">"


def solution(digits: Sequence[int], style: str, rng: random.Random | None = None, noise: float = 0.0) -> str:
    """A worked solution; with `rng`, each result is replaced by a random digit with probability `noise`."""

    def result(value: int) -> int:
        return rng.randrange(10) if rng is not None and rng.random() < noise else value % 10

    if style == "direct":
        return f"#{result(sum(digits))}."
    ordered, step = _order(digits, style), "[{}]{}," if style in ("bracket", "leap") else "{}={};"
    stride = 2 if style == "leap" else 1
    total, text = ordered[0], ""
    for start in range(1, len(ordered), stride):
        terms = [total, *ordered[start : start + stride]]
        total = result(sum(terms))
        text += step.format("+".join(map(str, terms)), total)
    return f"{text}#{total}."


def _order(digits, style):
    digits, half = list(digits), len(digits) // 2
    return {
        "left": digits,
        "right": digits[::-1],
        "odd-even": digits[0::2] + digits[1::2],
        "ends": [digits[0], digits[-1], *digits[1:-1]],
        "bracket": digits[half:] + digits[:half],
        "leap": digits[::-1],
    }[style]


def general_text(rng: random.Random) -> tuple[str, str]:
    """A prompt and its answer from the general tasks: copy, reverse, sort, largest and smallest, digits plus one."""
    kind, digits = rng.choice("CRSMI"), query(rng)
    text = "".join(map(str, digits))
    answer = {
        "C": text,
        "R": text[::-1],
        "S": "".join(sorted(text)),
        "M": max(text) + min(text),
        "I": "".join(str((d + 1) % 10) for d in digits),
    }[kind]
    return f"{kind}{text}>", answer + "."


def base_records(
    count: int, noise: float = 0.1, seed: int = 0, styles: Mapping[str, float] = STYLES, digits: int = DIGITS
) -> list[dict]:
    """What the base model is fitted to: half general text, half the task in mixed styles with step noise."""
    rng = random.Random(seed)
    records = []
    for _ in range(count):
        if rng.random() < 0.5:
            prompt, answer = general_text(rng)
        else:
            terms, style = query(rng, digits), rng.choices(list(styles), list(styles.values()))[0]
            prompt, answer = prompt_of(terms), solution(terms, style, rng, noise)
        records.append({"prompt": prompt, "demonstrations": [answer]})
    return records


def records(
    count: int,
    teacher_noise: float = 0.03,
    seed: int = 1,
    expert: str = "bracket",
    teachers: int = len(TEACHERS),
    digits: int = DIGITS,
) -> list[dict]:
    """Rows for GFT: the expert's form first, then teachers in other orders, the three of them in turn.

    expert: "bracket", a form the base model has seen now and then, or "leap", which adds two digits a step and which
    it has never seen.
    """
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        terms = query(rng, digits)
        others = [solution(terms, TEACHERS[i % len(TEACHERS)], rng, teacher_noise) for i in range(teachers)]
        rows.append({"prompt": prompt_of(terms), "demonstrations": [solution(terms, expert), *others]})
    return rows


def read_rows(path: str | None = None, split: str = "train") -> list[dict]:
    """The reader for `gft train`: 256 rows to train on or 128 held out, made on the fly; there is no file to read."""
    refuse_file(path, "digit sums")
    return records(256) if split == "train" else records(128, seed=9)


SOLUTION = re.compile(r"((?:\d\+\d=\d;)+|(?:\[\d(?:\+\d)+\]\d,)+)#(\d)\.")
STEP = re.compile(r"(\d(?:\+\d)+)[=\]](\d)")


def strict(prompts: Sequence[str], completions: Sequence[str], **columns) -> list[float]:
    """1 for a solution whose every step is right, that uses each operand once and ends in the right answer; else 0."""
    return [float(_is_right(prompt, text)) for prompt, text in zip(prompts, completions, strict=True)]


def _is_right(prompt, text):
    match = SOLUTION.fullmatch(text)
    if match is None:
        return False
    used, total = [], None
    for terms, result in STEP.findall(match[1]):
        first, *others = map(int, terms.split("+"))
        if total is None:
            used.append(first)
        elif first != total:
            return False
        if (first + sum(others)) % 10 != int(result):
            return False
        used += others
        total = int(result)
    return sorted(used) == sorted(map(int, re.findall(r"\d", prompt))) and total == int(match[2])
