"""Rewards to advantages. Tiny work, so a call's fixed costs are what is seen. Sizes: S responses in G groups of K."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness import AbsentError, Answer, Deviation, Step
from benchmarks.kinds.kind import Kind, Peer, words_of

EPS = 1e-6


@dataclass(frozen=True)
class AdvantageCase:
    """One measurement of rewards becoming advantages."""

    responses: int
    group_size: int
    grouped_by: str = "size"  # size: groups lie together; ids: in any order
    seed: int = 20
    device: str = "cpu"
    threads: int = 1
    upstream = 1.0  # nothing is differentiated

    def label(self) -> str:
        how = {"size": "together", "ids": "by id"}[self.grouped_by]
        return ", ".join([f"{self.responses} rewards in groups of {self.group_size} {how}", *words_of(self)])


def cases(device: str, *, quick: bool = False, threads: int = 1) -> list[AdvantageCase]:
    """A micro-batch, a batch, and far more than anyone has; groups together and by id."""
    sizes = (64,) if quick else (64, 4096, 65536)
    return [AdvantageCase(n, 8, how, device=device, threads=threads) for n in sizes for how in ("size", "ids")]


@dataclass(frozen=True)
class AdvantageProblem:
    """Rewards of 0, 1 and between, half of the groups' responses alike on average; and whose group each is in."""

    case: AdvantageCase
    rewards_S: Tensor  # float32
    group_ids_S: Tensor  # int64; consecutive where the case says that groups lie together

    limit = 1e-4  # of the largest advantage: a float32 standard deviation of near-equal rewards has no more

    def prepare(self, upstream: float) -> None:
        """Nothing is overwritten, nothing differentiated."""

    def deviation(self, answer: Answer, objective: str) -> Deviation:
        """Against fp64, group by group."""
        assert objective == "advantages", objective
        order_S = self.group_ids_S.argsort(stable=True)
        rewards_GK = self.rewards_S.double()[order_S].view(-1, self.case.group_size)
        centred_GK = rewards_GK - rewards_GK.mean(1, keepdim=True)
        truth_S = torch.empty(self.case.responses, dtype=torch.float64, device=order_S.device)
        truth_S[order_S] = (centred_GK / (rewards_GK.std(1, keepdim=True) + EPS)).flatten()
        gap_S = (answer.loss.double() - truth_S).abs().nan_to_num(nan=float("inf"))
        worst = (gap_S / truth_S.abs().clamp(min=1e-3)).max().item()
        return Deviation((gap_S.max() / truth_S.abs().max()).item(), worst)


def build(case: AdvantageCase) -> AdvantageProblem:
    generator = torch.Generator(case.device).manual_seed(case.seed)
    rewards_S = torch.randint(5, (case.responses,), generator=generator, device=case.device) / 4
    group_ids_S = torch.arange(case.responses, device=case.device) // case.group_size
    if case.grouped_by == "ids":
        group_ids_S = group_ids_S[torch.randperm(case.responses, generator=generator, device=case.device)]
    return AdvantageProblem(case, rewards_S, group_ids_S)


def step_of(way: Callable[[AdvantageProblem], Tensor], problem: AdvantageProblem) -> Step:
    return lambda: Answer(way(problem), ())


def _floor(problem: AdvantageProblem) -> Step:
    def step() -> None:
        problem.rewards_S.mul(1.0009765625)

    return step


def _ours(problem: AdvantageProblem) -> Tensor:
    from gft_kernels import group_advantages

    if problem.case.grouped_by == "ids":
        return group_advantages(problem.rewards_S, group_ids=problem.group_ids_S, eps=EPS)
    return group_advantages(problem.rewards_S, group_size=problem.case.group_size, eps=EPS)


def _view(problem: AdvantageProblem) -> Tensor:
    """What TRL and most loops write for groups that lie together."""
    if problem.case.grouped_by == "ids":
        raise AbsentError("it takes groups that lie together, and these are in any order")
    rewards_GK = problem.rewards_S.view(-1, problem.case.group_size)
    repeats = problem.case.group_size
    mean_S = rewards_GK.mean(1).repeat_interleave(repeats)
    return (problem.rewards_S - mean_S) / (rewards_GK.std(1).repeat_interleave(repeats) + EPS)


def _dictionary(problem: AdvantageProblem) -> Tensor:
    """A dictionary of lists by group id, walked in Python, as verl does it."""
    groups: dict[int, list[Tensor]] = defaultdict(list)
    ids = problem.group_ids_S.tolist()
    for i, group in enumerate(ids):
        groups[group].append(problem.rewards_S[i])
    moments = {group: torch.std_mean(torch.stack(rewards)) for group, rewards in groups.items()}
    advantages = [(problem.rewards_S[i] - moments[g][1]) / (moments[g][0] + EPS) for i, g in enumerate(ids)]
    return torch.stack(advantages)


PEERS = {
    "floor: rewards.mul(c)": Peer(step=_floor, objective=None),
    "gft_kernels group_advantages": Peer(_ours, "advantages"),
    "eager PyTorch, view and repeat": Peer(_view, "advantages"),
    "Python dictionary of groups": Peer(_dictionary, "advantages"),
}

KIND = Kind("rewards to advantages", AdvantageCase, cases, build, PEERS, step_of, lambda case: 4 * case.responses)
