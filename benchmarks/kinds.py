"""The benchmarks by name: their cases, their inputs, who takes part. Also for whoever rebuilds a case from its JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks import grids
from benchmarks.advantage_problem import advantage_contender, advantage_contenders, build_advantage_problem
from benchmarks.harness import Absent, Contender
from benchmarks.linear_peers import linear_contender, linear_contenders
from benchmarks.linear_problem import build_linear_problem
from benchmarks.log_probs import build_log_prob_problem, log_prob_contender, log_prob_contenders
from benchmarks.peers import row_contender, row_contenders
from benchmarks.row_problem import build_row_problem
from benchmarks.shapes import AdvantageCase, LinearCase, LogProbCase, RowCase, ShardCase, StepCase
from benchmarks.shards import build_shard_problem, shard_contender, shard_contenders
from benchmarks.step_peers import step_contender, step_contenders
from benchmarks.step_problem import build_step_problem
from benchmarks.traffic import ITEM_BYTES, logits_bytes


@dataclass(frozen=True)
class Kind:
    """One benchmark."""

    title: str
    case: type
    cases: Callable[..., list]  # (device, quick=, threads=) -> the cases that are timed
    weighed: Callable[..., list]  # the same -> those of which peak memory is measured as well
    build: Callable  # case -> problem
    contenders: Callable  # (problem, only) -> everyone
    contender: Callable  # (problem, name) -> that one
    input_bytes: Callable[..., int]  # what extra memory is a multiple of

    def invite(self, problem, only: str = "", skip: Sequence[str] = ()) -> list[Contender | Absent]:
        """Those whose name contains `only`, without those whose name contains any of `skip`; the floor always comes."""
        return [c for c in self.contenders(problem, only) if "floor" in c.name or not any(s in c.name for s in skip)]


def _logits_bytes(case: RowCase) -> int:
    return logits_bytes(case.rows, case.vocab, case.dtype)


def _hidden_and_head_bytes(case: LinearCase) -> int:
    return (case.rows + case.vocab) * case.hidden * ITEM_BYTES[case.dtype]


def _rewards_bytes(case: AdvantageCase) -> int:
    return 4 * case.responses


def _shard_bytes(case: ShardCase) -> int:
    return _logits_bytes(case) // case.ranks


def _embedding_bytes(case: StepCase) -> int:
    return case.vocab * case.hidden * ITEM_BYTES[case.dtype]


KINDS = {
    "row": Kind("loss and gradient over logits", RowCase, grids.row_cases, grids.row_memory_cases,
                build_row_problem, row_contenders, row_contender, _logits_bytes),
    "linear": Kind("loss and gradients over hidden states and output head", LinearCase, grids.linear_cases,
                   grids.linear_memory_cases, build_linear_problem, linear_contenders, linear_contender,
                   _hidden_and_head_bytes),
    "log-probs": Kind("log-probabilities of the targets, no gradient", LogProbCase, grids.log_prob_cases,
                      grids.log_prob_memory_cases, build_log_prob_problem, log_prob_contenders,
                      log_prob_contender, _hidden_and_head_bytes),
    "advantages": Kind("rewards to advantages", AdvantageCase, grids.advantage_cases, grids.no_case,
                       build_advantage_problem, advantage_contenders, advantage_contender, _rewards_bytes),
    "shards": Kind("loss and gradient over logits sharded over the vocabulary", ShardCase, grids.shard_cases,
                   grids.no_case, build_shard_problem, shard_contenders, shard_contender, _shard_bytes),
    "step": Kind("an optimizer step of a small model", StepCase, grids.step_cases, grids.step_memory_cases,
                 build_step_problem, step_contenders, step_contender, _embedding_bytes),
}  # fmt: skip
