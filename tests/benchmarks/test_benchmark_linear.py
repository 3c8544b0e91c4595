"""The linear benchmark: its fp64 check, its floor of three products, who is asked in which case."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.harness import Answer, Contender, check
from benchmarks.linear_peers import linear_contender, linear_contenders
from benchmarks.linear_problem import build_linear_problem
from benchmarks.shapes import LinearCase

SMALL = LinearCase(rows=24, hidden=48, vocab=311, responses=4)
DEAD = ("none", "masked", "zero-advantage")


@pytest.mark.parametrize("dead", DEAD)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_linear_answers_pass(dead, dtype):
    problem = build_linear_problem(replace(SMALL, dead=dead, dtype=dtype, temperature=0.8))
    for name in ("gft_linear_loss reference", "eager PyTorch, lean", "F.linear_cross_entropy"):
        outcome = check(problem, linear_contender(problem, name))
        assert outcome.status in ("ready", "absent"), f"{name}: {outcome.why}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("which", [0, 1], ids=["hidden", "weight"])
@pytest.mark.parametrize("spoil", [torch.zeros_like, torch.neg, lambda g: g * 1.7])
def test_wrong_linear_gradient_is_refused(which, spoil, dtype):
    problem = build_linear_problem(replace(SMALL, dtype=dtype))
    step = linear_contender(problem, "eager PyTorch, lean").step

    def wrong() -> Answer:
        answer = step()
        gradients = list(answer.gradients)
        gradients[which] = spoil(gradients[which])
        return Answer(answer.loss, tuple(gradients))

    assert check(problem, Contender("spoiled", wrong)).status == "wrong answer"


def test_bare_products_are_the_three_products():
    problem = build_linear_problem(SMALL)
    step = linear_contender(problem, "floor: three bare products").step
    step()
    with torch.no_grad():
        hidden_ND, weight_VD = problem.hidden_ND, problem.weight_VD
        logits_NV = hidden_ND @ weight_VD.t()
        wanted = [logits_NV, logits_NV @ weight_VD, logits_NV.t() @ hidden_ND]
    for product, truth in zip(bare_products_of(step), wanted, strict=True):
        made = product()
        assert torch.allclose(made if made.shape == truth.shape else made.t(), truth, rtol=1e-4, atol=1e-3)


def bare_products_of(step):
    """The chosen products, from the closure of the step."""
    return next(cell.cell_contents for cell in step.__closure__ if isinstance(cell.cell_contents, list))


def test_a_case_of_our_chunk_size_asks_nobody_else():
    problem = build_linear_problem(replace(SMALL, chunk_rows=7))
    entries = linear_contenders(problem)
    assert {entry.name.split()[0] for entry in entries} == {"floor:", "gft_linear_loss"}
    reference = next(entry for entry in entries if entry.name == "gft_linear_loss reference")
    assert check(problem, reference).status == "ready"
