"""What the inputs of several kinds have in common, and the lines of a loss that every peer without GFT is given."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness import AbsentError

IGNORE_INDEX = -100


def credit(case, targets_N: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Advantages (N,) float32 of normal rewards, and targets with the dead part of the case taken out."""
    row_N = torch.arange(case.rows, device=case.device)
    response_N = row_N * case.responses // case.rows
    advantages_S = normal_advantages(case, generator)
    if case.dead == "zero-advantage":
        response_S = torch.arange(case.responses, device=case.device)
        advantages_S[response_S * case.dead_share % 1 < case.dead_share] = 0.0  # spread evenly; half: every other one
    if case.dead == "masked":  # the end of each response, as padding is
        position_N = row_N - torch.searchsorted(response_N, response_N)
        length_N = torch.bincount(response_N, minlength=case.responses)[response_N]
        targets_N = torch.where(position_N < (1 - case.dead_share) * length_N, targets_N, IGNORE_INDEX)
    return advantages_S[response_N], targets_N


def normal_advantages(case, generator: torch.Generator) -> Tensor:
    """(S,) float32, of normal rewards in one group."""
    rewards_S = torch.randn(case.responses, generator=generator, device=case.device)
    return (rewards_S - rewards_S.mean()) / (rewards_S.std() + 1e-6)


def peak_tokens(targets_N: Tensor, vocab: int, generator: torch.Generator) -> Tensor:
    """The likely token of each row: in three rows of four the target."""
    hits_N = torch.rand(targets_N.shape, generator=generator, device=targets_N.device) < 0.75
    return torch.where(hits_N, targets_N, (targets_N + 1) % vocab)


def peak_shares(rows: int, device: str) -> Tensor:
    """The probability (N,) of each row's likely token, as a trained model has them."""
    return torch.linspace(0.5, 0.999, rows, device=device)


def gft_of_log_probs(log_pi_N: Tensor, problem) -> Tensor:
    """The three lines that turn log-probabilities of the targets into the GFT loss (token mean)."""
    live_N = problem.targets_N != IGNORE_INDEX
    pi_N = log_pi_N.detach().exp()
    kappa_N = problem.advantages_N * torch.where(pi_N < problem.case.tau, pi_N, 1.0)
    return -torch.where(live_N, kappa_N * log_pi_N, 0.0).sum() / live_N.sum()


def tempered(x: Tensor, problem) -> Tensor:
    """For losses that know no temperature: of logits, or of hidden states, which divides the logits as well."""
    return x if problem.case.temperature == 1 else x / problem.case.temperature


def responses_of_one_length(case) -> tuple[int, int]:
    """(S, T). Raises AbsentError where the responses differ in length, or the rows do not divide."""
    if not case.of_one_length:
        raise AbsentError("it takes responses of one length, and the recorded ones have their own")
    if case.rows % case.responses:
        raise AbsentError(f"it takes responses of one length, and {case.rows} rows do not divide by {case.responses}")
    return case.responses, case.rows // case.responses
