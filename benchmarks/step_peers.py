"""Contenders of the whole-step benchmark: one model, one optimizer, and everyone's way from hidden states to a loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from benchmarks import linear_peers
from benchmarks.bare_products import bare_products_step
from benchmarks.harness import Absent, Contender
from benchmarks.peers import ours_loss, ours_name
from benchmarks.row_losses import paper_loss
from benchmarks.step_problem import StepProblem, optimizer_step

FLOOR = "floor: model, three bare products, update"
OURS_ON = {"cpu": "cpu", "cuda": "auto"}
SMALL_CHUNK = 64  # rows
PAPER = "eager PyTorch, paper's formulation"


def step_contenders(problem: StepProblem, only: str = "") -> list[Contender | Absent]:
    """Everyone who can be asked on this problem."""
    makers = _makers(problem.case.device)
    return [make(name, problem) for name, make in makers.items() if name == FLOOR or only in name]


def step_contender(problem: StepProblem, name: str) -> Contender | Absent:
    return _makers(problem.case.device)[name](name, problem)


def _makers(device: str) -> dict[str, Callable[[str, StepProblem], Contender | Absent]]:
    backend = OURS_ON[device]
    linear = linear_peers.makers(optimizer_step)
    # the chunked cross-entropy takes 14 times as long as everyone else, and is in the linear benchmark
    left_out = (linear_peers.FLOOR, "F.linear_cross_entropy, chunked", "gft_linear_loss reference")
    return {
        FLOOR: _floor,
        ours_name(backend, inplace=True): partial(_over_logits, partial(ours_loss, backend, True)),
        PAPER: partial(_over_logits, paper_loss),
        f"gft_linear_loss {backend}, chunks of {SMALL_CHUNK}": partial(_linear, backend, SMALL_CHUNK),
        **{name: make for name, make in linear.items() if name not in left_out and "auto" not in name},
    }


def _over_logits(loss: Callable[[Tensor, StepProblem], Tensor], name: str, problem: StepProblem) -> Contender:
    """A loss over the whole logits, as the model's own head makes them."""

    def over_hidden(hidden_ND: Tensor, weight_VD: Tensor, problem: StepProblem) -> Tensor:
        return loss(F.linear(hidden_ND, weight_VD), problem)

    return Contender(name, optimizer_step(over_hidden, problem), "gft")


def _linear(backend: str, chunk_rows: int, name: str, problem: StepProblem) -> Contender:
    """Ours where memory matters more than time."""
    return Contender(name, optimizer_step(partial(linear_peers.ours_loss, backend, chunk_rows), problem), "gft")


def _floor(name: str, problem: StepProblem) -> Contender:
    """What no loss can save: the model's own passes, the head's products and the update."""
    dhidden_ND = problem.hidden_ND().detach()  # any numbers of that shape
    products = bare_products_step(dhidden_ND, problem.weight_VD)

    def step() -> None:
        hidden_ND = problem.hidden_ND()
        products()
        hidden_ND.backward(dhidden_ND)
        problem.optimizer.step()
        problem.optimizer.zero_grad(set_to_none=True)

    return Contender(name, step, None)
