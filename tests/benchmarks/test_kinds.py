"""The kinds of benchmark: their inputs, who is asked in which case, and that wrong answers are refused."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
import torch

from benchmarks.harness import Answer, Contender, check
from benchmarks.kinds import KINDS, SWEEPS, linear, row, shards
from benchmarks.kinds.advantages import AdvantageCase
from benchmarks.kinds.inputs import IGNORE_INDEX
from benchmarks.kinds.linear import LinearCase
from benchmarks.kinds.log_probs import LogProbCase
from benchmarks.kinds.prompts import PromptCase
from benchmarks.kinds.row import RowCase
from benchmarks.kinds.shards import ShardCase
from benchmarks.kinds.step import StepCase

ROW = RowCase(rows=12, vocab=257, responses=4)
CASES = {
    "row": replace(ROW, temperature=0.8),
    "linear": LinearCase(24, 48, 311, responses=4, temperature=0.8),
    "log-probs": LogProbCase(24, 48, 311, temperature=0.8, dead="masked"),
    "advantages": AdvantageCase(48, 8, grouped_by="ids"),
    "step": StepCase(6, vocab=307, hidden=16, layers=1, heads=2, responses=4, threads=1),
    "prompts": PromptCase(5, 3, vocab=307, hidden=24, layers=2, heads=3, responses=4, threads=1),
}
SERVED = {
    "row": {"gft_loss reference", "eager PyTorch, lean", "F.cross_entropy"},
    "linear": {"gft_linear_loss reference", "eager PyTorch, lean"},
    "log-probs": {"gft_kernels token_log_probs reference", "eager PyTorch, log-softmax", "eager PyTorch, logsumexp"},
    "advantages": {"gft_kernels group_advantages", "Python dictionary of groups"},
    "step": {"eager PyTorch, lean", "eager PyTorch, paper's formulation"},
    "prompts": {"gft_linear_loss, whole rows", "gft_linear_loss, each prompt once"},
}
VARIANTS = {
    "row": [{"dead": dead, "dtype": dtype} for dead in ("none", "masked", "zero-advantage")
            for dtype in ("float32", "bfloat16")],
    "linear": [{"dead": "masked"}, {"dead": "zero-advantage"}, {"dtype": "bfloat16"}],
}  # fmt: skip


def problem_of(kind: str, **changes):
    if kind in ("step", "prompts"):
        pytest.importorskip("transformers")
    return KINDS[kind].build(replace(CASES[kind], **changes))


# ---- answers


@pytest.mark.parametrize(("kind", "changes"), [(k, v) for k in CASES for v in VARIANTS.get(k, [{}])])
def test_right_answers_pass_and_the_absent_say_why(kind, changes):
    problem, ready = problem_of(kind, **changes), set()
    for contender in KINDS[kind].invite(problem, skip=["torch.compile"]):
        outcome = check(problem, contender)
        if outcome.status == "absent":
            assert len(outcome.why.split()) > 4, f"{outcome.name}: {outcome.why!r} is no sentence"
        if changes.get("dtype") != "bfloat16":  # in bf16 peers may be wrong; ours and the careful ones are below
            assert outcome.status in ("ready", "absent"), f"{contender.name}: {outcome.why}"
        ready |= {contender.name} if outcome.status == "ready" else set()
    assert ready >= SERVED[kind]


def refuses(kind: str, problem, name: str, spoil) -> bool:
    """Whether a contender is refused once its answer is spoiled: its loss (or values) and its list of gradients."""
    right = KINDS[kind].contender(problem, name)

    def wrong() -> Answer:
        answer = right.step()
        loss, gradients = spoil(answer.loss, [gradient.clone() for gradient in answer.gradients])
        return Answer(loss, tuple(gradients))

    return check(problem, Contender("spoiled", wrong, right.objective)).status == "wrong answer"


def of_gradient(number: int, change):
    return lambda loss, gradients: (loss, [change(g) if i == number else g for i, g in enumerate(gradients)])


def one_nan(gradient_NV):
    gradient_NV.view(-1)[gradient_NV.numel() // 2] = math.nan
    return gradient_NV


def one_row_doubled(gradient_NV):
    gradient_NV[gradient_NV.norm(dim=1).argmax()] *= 2
    return gradient_NV


CHANGES = (one_nan, one_row_doubled, torch.zeros_like, torch.neg, lambda g: g * 1.7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("kind", "number"), [("row", 0), ("linear", 0), ("linear", 1)])
def test_a_wrong_gradient_is_refused(kind, number, change, dtype):
    if kind == "linear" and change is one_row_doubled and dtype == "bfloat16":
        pytest.skip("sampled tokens under a wide limit")
    assert refuses(kind, problem_of(kind, dtype=dtype), "eager PyTorch, lean", of_gradient(number, change))


STEPS = {"step": "eager PyTorch, lean", "prompts": "gft_linear_loss, whole rows"}


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("kind", STEPS)
def test_a_step_with_one_wrong_gradient_is_refused(kind, number):
    assert refuses(kind, problem_of(kind), STEPS[kind], of_gradient(number, lambda g: g * 1.01))


@pytest.mark.parametrize("kind", ["row", "log-probs", "advantages"])
@pytest.mark.parametrize("change", [lambda x: x * 1.01, lambda x: x.roll(1) + 0.01, lambda x: x + math.nan])
def test_a_wrong_loss_or_value_is_refused(kind, change):
    name = min(SERVED[kind], key=lambda name: not name.startswith("gft_"))
    assert refuses(kind, problem_of(kind), name, lambda loss, gradients: (change(loss), gradients))


def test_gradient_in_a_dead_row_is_wrong():
    problem = problem_of("row", dead="masked")
    dead = (problem.targets_N == IGNORE_INDEX).nonzero()[0]
    fill = of_gradient(0, lambda gradient_NV: gradient_NV.index_fill(0, dead, 1e-2))
    assert refuses("row", problem, "eager PyTorch, lean", fill)


def test_dropping_the_upstream_gradient_is_wrong():
    problem = problem_of("row")

    def step() -> Answer:
        logits_NV = problem.logits_NV.clone().requires_grad_()
        loss = row.lean_loss(logits_NV, problem)
        return Answer(loss.detach(), torch.autograd.grad(loss, logits_NV))

    assert check(problem, Contender("drops it", step)).status == "wrong answer"


# ---- inputs, cases and floors


@pytest.mark.parametrize("dead", ["none", "masked", "zero-advantage"])
def test_inputs_are_what_the_case_says(dead):
    problem = row.build(replace(ROW, rows=64, responses=8, dead=dead))
    live_N, advantages_S = problem.targets_N != IGNORE_INDEX, problem.advantages_N.view(8, 8)[:, 0]
    assert live_N.sum() == problem.live_rows == (32 if dead == "masked" else 64)
    assert (advantages_S == 0).sum() == (4 if dead == "zero-advantage" else 0)
    pi_N = problem.logits_NV.double().softmax(1).max(1).values
    assert pi_N[0] == pytest.approx(0.5, abs=1e-5) and pi_N[-1] == pytest.approx(0.999, abs=1e-5)


def test_same_case_same_inputs():
    assert torch.equal(row.build(ROW).logits_NV, row.build(ROW).logits_NV)
    assert not torch.equal(row.build(ROW).logits_NV, row.build(replace(ROW, seed=21)).logits_NV)


def test_the_grid_names_every_vocabulary_and_losing_sizes():
    cases = row.cases("cpu")
    assert {case.vocab for case in cases} == set(row.VOCABULARIES)
    assert 1 in {case.rows for case in cases}, "small N, where fused kernels lose, must be in the grid"
    assert {case.dead for case in cases} == {"none", "masked", "zero-advantage"}
    assert {case.threads for case in cases} == {1, 2} and len(row.cases("cpu", quick=True)) < 5


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_case_can_be_made_again_from_its_json(kind, device):
    of = KINDS[kind]
    cases = [*of.cases(device), *of.cases(device, quick=True), *of.weighed(of.cases(device), False)]
    cases += [case for name, sweep in SWEEPS.values() if name == kind for case in sweep(device, threads=1)]
    assert all(of.case(**json.loads(json.dumps(asdict(case)))) == case and of.input_bytes(case) > 0 for case in cases)
    assert all("floor" in name for name, peer in of.peers.items() if peer.objective is None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_floor_touches_every_byte_once_and_as_an_integer(dtype):
    problem = row.build(RowCase(7, 1003, dtype))
    before = problem.logits_NV.view(-1).view(torch.uint8).clone()
    step = KINDS["row"].contender(problem, row.FLOOR).step
    step()
    after = problem.logits_NV.view(-1).view(torch.uint8)
    *words, rest = (after != before).split(8)
    assert all(word.sum() == 1 for word in words) and rest.sum() == 0
    step()
    assert torch.equal(after, before), "nothing was converted or rounded"


def test_bare_products_are_the_three_products():
    problem = problem_of("linear")
    step = linear.bare_products(problem.hidden_ND, problem.weight_VD)
    step()
    with torch.no_grad():
        logits_NV = problem.hidden_ND @ problem.weight_VD.t()
        wanted = [logits_NV, logits_NV @ problem.weight_VD, logits_NV.t() @ problem.hidden_ND]
    chosen = next(cell.cell_contents for cell in step.__closure__ if isinstance(cell.cell_contents, list))
    for product, truth in zip(chosen, wanted, strict=True):
        made = product()
        assert torch.allclose(made if made.shape == truth.shape else made.t(), truth, rtol=1e-4, atol=1e-3)


def test_trained_states_are_as_sure_as_they_say():
    draws = torch.Generator().manual_seed(3)
    weight_VD = torch.randn(32_003, 1_024, generator=draws) / 32
    hidden_ND, tokens_NK = linear.trained_states(weight_VD, 256, draws)
    pi_NK = (hidden_ND @ weight_VD.t()).softmax(1).gather(1, tokens_NK)
    low, middle, high = torch.logit(pi_NK[:, 0]).quantile(torch.tensor([0.25, 0.5, 0.75]))
    assert 3.2 < middle < 4.6 and 3.2 < high - low < 4.9  # quartiles of N(3.9, 3²) are 4.05 apart
    after_NK = pi_NK[:, 1:] / pi_NK[:, 1:2]
    assert torch.allclose(after_NK, torch.arange(1, linear.LIKELY) ** -1.5, rtol=1e-3)
    others_N = (1 - pi_NK.sum(1)) / (1 - pi_NK[:, 0])
    assert 0.03 < others_N.median() < 0.07
    commonness_V = (hidden_ND @ weight_VD.t()).median(0).values
    assert 2.2 < commonness_V.std() < 2.6


def test_a_case_of_our_chunk_size_asks_nobody_else():
    problem = problem_of("linear", chunk_rows=7)
    entries = {entry.name: entry for entry in KINDS["linear"].invite(problem)}
    assert {name.split()[0].rstrip(",") for name in entries} == {"floor:", "gft_linear_loss"}
    assert check(problem, entries["gft_linear_loss reference"]).status == "ready"


def test_whom_only_and_skip_leave():
    def names(problem, *only: str) -> set[str]:
        return {entry.name for entry in KINDS["row"].invite(problem, only, skip=["compile"])}

    problem, lean = problem_of("row"), {row.FLOOR, "eager PyTorch, lean"}
    assert names(problem, "cpu", "lean") == lean | {"gft_loss cpu", "gft_loss cpu, in place"}
    assert names(problem, "auto, in place") == {row.FLOOR, "gft_loss auto, in place"}
    on_gpu = replace(problem, case=replace(problem.case, device="cuda"))
    assert names(on_gpu, "cpu", "lean") == lean, "kernels of a CPU cannot take part on a GPU"


# ---- whole steps


def test_a_step_moves_the_weights_and_prepare_puts_them_back():
    problem = problem_of("step")
    step = KINDS["step"].contender(problem, "eager PyTorch, lean").step
    step()
    assert not torch.equal(problem.parameters()[0], problem.pristine[0])
    assert all(parameter.grad is None for parameter in problem.parameters()), "the next step's peak begins without them"
    problem.prepare(1.0)
    assert all(map(torch.equal, problem.parameters(), problem.pristine))


def test_both_sides_of_tau_occur_in_the_step():
    problem = problem_of("step", vocab=5003, hidden=64, tokens=32)
    with torch.no_grad():
        logits = problem.hidden_of(problem.model) @ problem.weight_VD.t()
    pi = logits.softmax(1).gather(1, problem.targets_N[:, None])
    assert (pi < problem.case.tau).any() and (pi > problem.case.tau).any()


# ---- ranks


def test_ranks_agree_and_answer_right():
    case = ShardCase(rows=12, vocab=258, responses=4)
    outcomes = shards.measure_in_ranks(case, rounds=2, only=[], skip=["torch"], cold=False, budget_s=60.0)
    found = {outcome.name: outcome for outcome in outcomes}
    for name in (row.FLOOR, "gft_loss reference", "eager PyTorch, Megatron's way", "eager PyTorch, logits gathered"):
        assert found[name].status == "timed" and found[name].rounds == 2, found[name].why
    assert found["gft_loss reference"].error < 1e-6


def test_ranks_that_fail_say_why():
    (outcome,) = shards.measure_in_ranks(ShardCase(12, 259), rounds=1, only=[], skip=[], cold=False, budget_s=60.0)
    assert outcome.status == "failed" and "vocab=259" in outcome.why
