"""Log-probabilities of the targets from hidden states and head, without gradient.

What a reference or an old policy is asked for. One product of the full size is the least.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Answer, Deviation, Step
from benchmarks.kinds import linear
from benchmarks.kinds.kind import BACKENDS, DTYPES, Kind, Peer, served, whole_grid
from benchmarks.kinds.linear import LinearCase, LinearProblem

OBJECTIVE = "log-probs"


class LogProbCase(LinearCase):
    """One measurement of the targets' log-probabilities, without gradient."""

    def label(self) -> str:
        return f"log-probs {super().label()}"


def cases(device: str, *, quick: bool = False, threads: int = 1) -> list[LogProbCase]:
    """The heads of Qwen2.5-0.5B and Llama 3.1 8B; quick: a small one."""
    if quick:
        return [LogProbCase(64, 128, 32000, device=device, threads=threads)]
    if device == "cpu":
        return [LogProbCase(512, 896, 151936, dtype, threads=threads) for dtype in DTYPES]
    return [LogProbCase(8192, d, v, "bfloat16", device=device) for d, v in ((4096, 128256), (896, 151936))]


class LogProbProblem(LinearProblem):
    """As the linear benchmark's, with another check."""

    def deviation(self, answer: Answer, objective: str) -> Deviation:
        """scaled: the largest gap in nats; worst row: against that row's own log π. Of the rows that have a target."""
        assert objective == OBJECTIVE, objective
        live_N = self.targets_N >= 0
        truth_N = self.target_logits_N - self.log_masses_N
        gap_N = (answer.loss.double() - truth_N)[live_N].abs().nan_to_num(nan=float("inf"))
        return Deviation(gap_N.max().item(), (gap_N / truth_N[live_N].abs().clamp(min=1e-6)).max().item())


def build(case: LogProbCase) -> LogProbProblem:
    return LogProbProblem(**vars(linear.build(case)))


def step_of(log_probs: Callable[[Tensor, Tensor, LinearProblem], Tensor], problem: LogProbProblem) -> Step:
    def step() -> Answer:
        with torch.no_grad():
            return Answer(log_probs(problem.hidden_ND, problem.weight_VD, problem), ())

    return step


def _ours(backend: str, hidden_ND: Tensor, weight_VD: Tensor, problem: LinearProblem) -> Tensor:
    from gft_kernels import token_log_probs

    options = {"temperature": problem.case.temperature, "backend": backend}
    return served(token_log_probs, hidden_ND, weight_VD, problem.targets_N, **options)


def _logsumexp(hidden_ND: Tensor, weight_VD: Tensor, problem: LinearProblem) -> Tensor:
    """The target's logit minus log Σ e^z: no array of log-probabilities."""
    logits_NV = F.linear(hidden_ND, weight_VD).float() / problem.case.temperature
    return logits_NV.gather(1, problem.targets_N.clamp(min=0)[:, None])[:, 0] - logits_NV.logsumexp(1)


PEERS = {
    "floor: the bare product": Peer(step=lambda p: linear.bare_products(p.hidden_ND, p.weight_VD, 1), objective=None),
    **{f"gft_kernels token_log_probs {backend}": Peer(partial(_ours, backend), OBJECTIVE) for backend in BACKENDS},
    "eager PyTorch, log-softmax": Peer(linear.log_probs_of_all_logits, OBJECTIVE),
    "eager PyTorch, logsumexp": Peer(_logsumexp, OBJECTIVE),
    "torch.compile of log-softmax": Peer(linear.log_probs_of_all_logits, OBJECTIVE, compiled=True),
    "TRL chunked log-probabilities": Peer(linear.trl_log_probs, OBJECTIVE, "trl.kernels.chunked_logprob"),
}

KIND = Kind("log-probabilities of the targets, no gradient", LogProbCase, cases, build, PEERS, step_of,
            linear.hidden_and_head_bytes, weighed=lambda timed, quick: whole_grid(timed[:1], quick))  # fmt: skip
