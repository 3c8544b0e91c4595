"""The two kinds of benchmark by name, for whoever has to rebuild a case from its JSON (the memory probe, compare)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.linear_peers import linear_contender, linear_contenders
from benchmarks.linear_problem import build_linear_problem
from benchmarks.peers import row_contender, row_contenders
from benchmarks.row_problem import build_row_problem
from benchmarks.shapes import LinearCase, RowCase
from benchmarks.traffic import ITEM_BYTES, logits_bytes


@dataclass(frozen=True)
class Kind:
    case: type
    build: Callable
    contenders: Callable  # (problem, only) -> everyone
    contender: Callable  # (problem, name) -> that one
    input_bytes: Callable[..., int]  # what extra memory is a multiple of


def _logits_bytes(case: RowCase) -> int:
    return logits_bytes(case.rows, case.vocab, case.dtype)


def _hidden_and_head_bytes(case: LinearCase) -> int:
    return (case.rows + case.vocab) * case.hidden * ITEM_BYTES[case.dtype]


KINDS = {
    "row": Kind(RowCase, build_row_problem, row_contenders, row_contender, _logits_bytes),
    "linear": Kind(LinearCase, build_linear_problem, linear_contenders, linear_contender, _hidden_and_head_bytes),
}
