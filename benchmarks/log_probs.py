"""Log-probabilities of the targets from hidden states and head, without gradient: the check and the contenders.

What a reference or an old policy is asked for. One product of the full size is the least.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks import linear_libraries
from benchmarks.bare_products import bare_products_step
from benchmarks.gpu_peers import absent_peer
from benchmarks.harness import Absent, AbsentError, Answer, Contender, Deviation
from benchmarks.linear_peers import log_probs_of_all_logits
from benchmarks.linear_problem import LinearProblem, build_linear_problem
from benchmarks.peers import BACKENDS, compile_or_absent
from benchmarks.shapes import LogProbCase

LogProbs = Callable[[LinearProblem], Tensor]
FLOOR = "floor: the bare product"
OBJECTIVE = "log-probs"


class LogProbProblem(LinearProblem):
    """As the linear benchmark's, with another check."""

    def deviation(self, answer: Answer, objective: str) -> Deviation:
        """scaled: the largest gap in nats; worst row: against that row's own log π. Of the rows that have a target."""
        assert objective == OBJECTIVE, objective
        live_N = self.targets_N >= 0
        truth_N = self.target_logits_N - self.log_masses_N
        gap_N = (answer.loss.double() - truth_N)[live_N].abs().nan_to_num(nan=float("inf"))
        return Deviation(gap_N.max().item(), (gap_N / truth_N[live_N].abs().clamp(min=1e-6)).max().item())


def build_log_prob_problem(case: LogProbCase) -> LogProbProblem:
    return LogProbProblem(**vars(build_linear_problem(case)))


def log_prob_contenders(problem: LogProbProblem, only: str = "") -> list[Contender | Absent]:
    """Everyone who can be asked on this problem."""
    return [make(name, problem) for name, make in _makers().items() if name == FLOOR or only in name]


def log_prob_contender(problem: LogProbProblem, name: str) -> Contender | Absent:
    return _makers()[name](name, problem)


def _makers() -> dict[str, Callable[[str, LogProbProblem], Contender | Absent]]:
    backends = [backend for backend in BACKENDS if backend != "auto"]
    return {
        FLOOR: _floor,
        **{f"gft_kernels token_log_probs {backend}": partial(_plain, partial(_ours, backend)) for backend in backends},
        "eager PyTorch, log-softmax": partial(_plain, _eager),
        "eager PyTorch, logsumexp": partial(_plain, _logsumexp),
        "torch.compile of log-softmax": _compiled,
        "TRL chunked log-probabilities": _trl,
    }


def _floor(name: str, problem: LogProbProblem) -> Contender:
    return Contender(name, bare_products_step(problem.hidden_ND, problem.weight_VD, products=1), None)


def _plain(log_probs: LogProbs, name: str, problem: LogProbProblem) -> Contender:
    def step() -> Answer:
        with torch.no_grad():
            return Answer(log_probs(problem), ())

    return Contender(name, step, OBJECTIVE)


def _ours(backend: str, problem: LinearProblem) -> Tensor:
    from gft_kernels import token_log_probs
    from gft_kernels.options import BackendUnavailable

    tensors = problem.hidden_ND, problem.weight_VD, problem.targets_N
    try:
        return token_log_probs(*tensors, temperature=problem.case.temperature, backend=backend)
    except BackendUnavailable as reason:
        raise AbsentError(str(reason)) from reason


def _eager(problem: LinearProblem) -> Tensor:
    return log_probs_of_all_logits(problem.hidden_ND, problem.weight_VD, problem)


def _logsumexp(problem: LinearProblem) -> Tensor:
    """The target's logit minus log Σ e^z: no array of log-probabilities."""
    logits_NV = torch.nn.functional.linear(problem.hidden_ND, problem.weight_VD).float() / problem.case.temperature
    return logits_NV.gather(1, problem.targets_N.clamp(min=0)[:, None])[:, 0] - logits_NV.logsumexp(1)


def _compiled(name: str, problem: LogProbProblem) -> Contender:
    compiled = compile_or_absent(log_probs_of_all_logits)
    return _plain(lambda p: compiled(p.hidden_ND, p.weight_VD, p), name, problem)


def _trl(name: str, problem: LogProbProblem) -> Contender | Absent:
    absent = absent_peer(name, "trl.kernels.chunked_logprob", "cuda")  # the fold runs in torch where there is no GPU
    if absent:
        return absent
    return _plain(lambda p: linear_libraries.trl_log_probs(p.hidden_ND, p.weight_VD, p), name, problem)
