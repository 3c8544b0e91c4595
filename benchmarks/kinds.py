"""The two kinds of benchmark by name, for whoever has to rebuild a case from its JSON (the memory probe, compare)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.peers import row_contender, row_contenders
from benchmarks.row_problem import build_row_problem
from benchmarks.shapes import RowCase
from benchmarks.traffic import logits_bytes


@dataclass(frozen=True)
class Kind:
    case: type
    build: Callable
    contenders: Callable  # (problem, only) -> everyone
    contender: Callable  # (problem, name) -> that one
    input_bytes: Callable[..., int]  # what extra memory is a multiple of


def _logits_bytes(case: RowCase) -> int:
    return logits_bytes(case.rows, case.vocab, case.dtype)


KINDS = {"row": Kind(RowCase, build_row_problem, row_contenders, row_contender, _logits_bytes)}
