"""`policy_loss` against the float64 oracle: every objective, with penalties, on every backend; and its edges."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from cases import DTYPES, run
from policy_cases import (
    BOUNDS,
    CLIPPED,
    CLIPS,
    ESTIMATORS,
    OBJECTIVES,
    OF_RESPONSES,
    PENALTIES,
    UPSTREAM,
    WITH_RATIO,
    assert_right,
    problem,
)

from gft_kernels import objectives, policy_loss
from gft_kernels.advantages import RowCredit
from gft_kernels.linear import chunks
from gft_kernels.options import Credit, LinearCall, Objective

NAN, INF = float("nan"), float("inf")
pytestmark = pytest.mark.usefixtures("on_device")


def seeded(seed):
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


@pytest.mark.parametrize(
    ("objective", "dtype"),
    [(name, torch.float32) for name in OBJECTIVES]
    + [(name, dtype) for name in ("gft", "grpo", "cispo", "sapo", "luffy") for dtype in DTYPES[1:]],
    ids=str,
)
@pytest.mark.parametrize("penalties", [{}, PENALTIES], ids=["plain", "penalties"])
def test_every_objective(backend, objective, dtype, penalties):
    case = problem(objective, dtype=dtype, **penalties)
    loss, gradient = case.run(backend=backend)
    assert_right(case, loss, gradient)


def test_asft_is_dft_with_an_anchor(backend):
    case = problem("dft", beta=0.3)
    loss, gradient = case.run(backend=backend, objective="asft")
    assert_right(case, loss, gradient)


OWN_NUMBERS = {
    "gft": {"rectify": "bounded", "gamma": 0.3, "tau": 0.4},
    "luffy": {"gamma": 1.5},
    "eaft": {"entropy_power": 0.5},
    "sapo": {"gate_positive": 0.4, "gate_negative": 3.0},
}


@pytest.mark.parametrize("objective", OWN_NUMBERS)
def test_an_objectives_own_numbers(backend, objective):
    case = problem(objective, **OWN_NUMBERS[objective])
    assert_right(case, *case.run(backend=backend))


MIXTURES = {  # options of the loss; the oracle's objective and numbers of the samples; and of the given rows
    "luffy": (dict(objective="grpo", given_objective="luffy", gamma=0.2), ("grpo", {}), ("luffy", {"gamma": 0.2})),
    "chord": (dict(objective="dapo", given_objective="chord"), ("dapo", {"clip_high": 0.28}), ("chord", {})),
    "imitation": (dict(objective="sapo", given_objective="sft"), ("sapo", {}), ("sft", {})),
    "entropy": (
        dict(objective="cispo", given_objective="eaft", clip_low=0.3, clip_high=0.2),
        ("cispo", {"clip_low": 0.3}),
        ("eaft", {}),
    ),
    "two defaults of one option": (
        dict(objective="grpo", given_objective="psft"), ("grpo", {}), ("psft", {"clip_high": 0.28}),
    ),
    "rectified": (dict(objective="gft", tau=0.6, rectify="given"), ("gft", {"tau": 0.0}), ("gft", {"tau": 0.6})),
}  # fmt: skip


@pytest.mark.parametrize("mixture", MIXTURES)
def test_given_rows_have_their_own_objective(backend, mixture):
    """Two responses of six; over logits and over a head, given by response or by row."""
    options, (samples, numbers), (demonstrations, own) = MIXTURES[mixture]
    case = problem("grpo")
    given = torch.tensor([True, False, False, True, False, False])
    call = {**options, "mask": case.mask, "advantages": case.advantages, "given": given, "reduction": "sum"}
    if samples != "gft":
        call["old_log_probs"] = case.old
    leaf = case.logits.clone().requires_grad_(True)
    loss, stats = policy_loss(leaf, case.targets, return_stats=True, backend=backend, **call)
    (loss * UPSTREAM).backward()
    live = case.mask.flatten()
    losses, truth = oracle.loss_and_gradient(
        case.logits.flatten(0, 1), case.targets.flatten(), live, case.advantages.flatten(), live, UPSTREAM,
        objective=samples, old=case.old.flatten(), given=given.repeat_interleave(4), given_objective=demonstrations,
        given_terms=own, **numbers,
    )  # fmt: skip
    torch.testing.assert_close(loss.detach().double(), losses.sum(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(leaf.grad.flatten(0, 1).double(), truth, rtol=2e-5, atol=2e-6)
    if samples != "gft" and demonstrations != "psft":
        assert stats.ratios[given].eq(0).all() and not stats.clipped[given].any()
        assert stats.ratios[case.mask & ~given[:, None]].gt(0).all()
    rows = {**call, "given": given[:, None].expand(6, 4), "backend": backend}
    hidden, head = torch.randn(6, 4, 8), torch.randn(131, 8)
    expected = policy_loss(hidden @ head.t(), case.targets, **rows)
    over_head = policy_loss(hidden, case.targets, weight=head, chunk_rows=5, **rows)
    torch.testing.assert_close(over_head, expected, rtol=1e-5, atol=1e-5)


def of_responses(objective: str):
    """A problem with an advantage a response, clipped and free responses of both signs, and its float64 truth."""
    case = problem("grpo", responses=8)
    case.advantages = torch.tensor([1.0, -0.7, 0.0, 2.0, -1.5, 0.4, 1.2, -0.9])[:, None].expand(8, 4)
    options = {"clip_low": 0.05, "clip_high": 0.08} if objective == "gspo" else {"clip_low": 0.3, "clip_high": 0.2}
    z = case.logits.flatten(0, 1).double().requires_grad_(True)
    losses = oracle.sequence_losses(
        z, case.targets.flatten(), case.mask.flatten(), case.advantages.flatten(), case.old.flatten(),
        [r // 4 for r in range(32)], objective, **options,
    )  # fmt: skip
    loss = losses.sum() / 5
    (gradient,) = torch.autograd.grad(loss * UPSTREAM, z)
    call = {"objective": objective, "mask": case.mask, "advantages": case.advantages[:, 0], "num_items_in_batch": 5}
    return case, loss.detach(), gradient, {**call, "old_log_probs": case.old, **options}


@pytest.mark.parametrize("objective", OF_RESPONSES)
@pytest.mark.parametrize("layout", ["padded", "in place", "packed"])
def test_ratios_of_responses(backend, objective, layout):
    """Packed, most of the responses have no row here, and there are more of them than rows."""
    case, expected, truth, call = of_responses(objective)
    inputs, targets = case.logits.clone().requires_grad_(True), case.targets
    if layout == "packed":
        call |= {name: call[name].flatten() for name in ("mask", "old_log_probs")}
        call["sequence_ids"] = torch.arange(32) // 4 * 9
        call["advantages"] = call["advantages"].repeat_interleave(9)
        targets = targets.flatten()
    rows = inputs.flatten(0, 1) if layout == "packed" else inputs
    loss, stats = policy_loss(
        rows * 1, targets, return_stats=True, inplace=layout == "in place", backend=backend, **call
    )
    (loss * UPSTREAM).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(inputs.grad.flatten(0, 1).double(), truth, rtol=3e-5, atol=2e-6)
    live = case.mask.flatten()
    clipped = stats.clipped.flatten()[live]
    assert clipped.any() and not clipped.all()
    assert truth[live].eq(0).all(1).logical_and(case.advantages.flatten()[live] != 0).any()


@pytest.mark.parametrize("objective", OF_RESPONSES)
def test_ratios_of_responses_over_a_head(backend, objective):
    """And with penalties, in pieces, per row: as over the logits."""
    case, _, _, call = of_responses(objective)
    head = torch.linalg.qr(torch.randn(131, 131)).Q.requires_grad_(True)
    hidden = (case.logits @ head).detach().requires_grad_(True)  # the logits that old and reference policy are near to
    call |= {"beta": 0.2, "ref_log_probs": case.ref, "entropy_coef": 0.1, "backend": backend}
    for reduction, upstream in (("sequence-mean", torch.tensor(UPSTREAM)), ("none", torch.randn(8, 4))):
        options = {**call, "reduction": reduction, "num_items_in_batch": None}
        expected = policy_loss(hidden @ head.t(), case.targets, **options)
        loss = policy_loss(hidden, case.targets, weight=head, chunk_rows=5, **options)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        for found, truth in zip(
            torch.autograd.grad(loss, (hidden, head), upstream),
            torch.autograd.grad(expected, (hidden, head), upstream),
            strict=True,
        ):
            torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", OF_RESPONSES)
def test_a_bad_row_over_a_head_spoils_its_response_only(backend, objective):
    hidden, head, targets = torch.randn(3, 4, 8), torch.randn(31, 8), torch.randint(31, (3, 4))
    hidden[1, 2, 0] = NAN
    options = {"objective": objective, "old_log_probs": torch.full((3, 4), -3.0), "reduction": "none"}
    loss = policy_loss(hidden, targets, weight=head, backend=backend, **options)
    assert loss.isnan().all(1).tolist() == [False, True, False] and not loss[::2].isnan().any()


def test_a_row_of_weight_0_that_gmpo_holds_adds_nothing(backend):
    """Beside a ratio beyond float32."""
    logits, old = torch.randn(1, 2, 7), torch.tensor([[5.0, -500.0]])
    weights, targets = torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2, dtype=torch.long)
    options = {"objective": "gmpo", "old_log_probs": old, "advantages": torch.tensor([-1.0]), "reduction": "sum"}
    assert policy_loss(logits, targets, weights=weights, backend=backend, **options) == math.inf


@pytest.mark.parametrize("objective", OF_RESPONSES)
def test_on_policy_no_rounding_clips_a_response(backend, objective):
    """Its ratio is 1, whatever digits log pi has: the gradient of grpo, also with nothing between the bounds."""
    z, y = torch.randn(4, 20, 131), torch.randint(131, (4, 20))
    options = {"clip_low": 0.0, "clip_high": 0.0, "advantages": torch.tensor([1.0, -1.0, 0.5, -2]), "backend": backend}
    found, expected = (run(policy_loss, z, y, objective=name, **options) for name in (objective, "grpo"))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_demonstrations_beside_gmpo_have_their_own_loss(backend, device):
    """What gmpo holds at its bound, and adds to a response's loss, is its own rows' alone."""
    z, y = torch.randn(2, 3, 11, device=device), torch.randint(11, (2, 3), device=device)
    log_pi = torch.log_softmax(z.double(), -1).gather(-1, y[..., None])[..., 0]
    options = {"objective": "gmpo", "given_objective": "sft", "old_log_probs": (log_pi - 1.0).float()}
    options |= {"given": torch.tensor([True, False], device=device), "advantages": torch.ones(2, device=device)}
    found = policy_loss(z, y, reduction="none", backend=backend, **options)
    torch.testing.assert_close(found[0].double(), -log_pi[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1].double(), torch.full_like(log_pi[1], -math.exp(0.4)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", ["gft", "grpo"])
@pytest.mark.parametrize("reduction", ["token-mean", "sequence-mean", "none"])
def test_row_weights(backend, reduction, objective):
    """Weights multiply a row's share, penalties and all; a row of weight 0 is out, whatever it holds, yet counts."""
    case = problem(objective, **PENALTIES)
    case.weights = torch.rand(6, 4, generator=seeded(1)) * 2
    out = torch.rand(6, 4) < 0.3
    case.weights[out] = 0.0
    weights = oracle.row_weights(case.mask.flatten(), [r // 4 for r in range(24)], reduction)
    upstream = torch.randn(6, 4) if reduction == "none" else UPSTREAM
    flat = upstream.flatten().double() if reduction == "none" else upstream
    losses, truth = case.truth(flat, weights)
    spoilt = torch.where(out[..., None], NAN, case.logits)
    case.logits, clean = spoilt, case.logits
    options = {"reduction": reduction, "num_items_in_batch": None, "backend": backend}
    loss, gradient = case.run(upstream, **options)
    found = loss.detach().double().flatten() if reduction == "none" else loss.detach().double()
    torch.testing.assert_close(found, losses if reduction == "none" else losses.sum(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), truth, rtol=2e-5, atol=1e-6)
    assert gradient[out].eq(0).all()
    case.logits = clean
    _, stats = case.loss(return_stats=True, **options)
    assert stats.log_probs[case.mask].lt(0).all(), "for its statistics such a row is read"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("objective", CLIPPED)
def test_every_objective_within_bounds(backend, objective, dtype):
    case = problem(objective, dtype=dtype, **BOUNDS)
    (loss, stats), gradient = case.run(backend=backend, return_stats=True)
    assert_right(case, loss, gradient)
    held = case.mask & (case.advantages < 0) & (stats.ratios > BOUNDS["delta"])
    assert held.any() and stats.clipped[held].all() and stats.coefficients[held].eq(0).all()
    assert (case.mask & (case.ref - stats.log_probs > BOUNDS["kl_cap"])).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_every_estimate_of_the_kl(backend, estimator, dtype):
    case = problem("gft", dtype=dtype, beta=0.3, **estimator)
    (loss, stats), gradient = case.run(backend=backend, return_stats=True)
    assert_right(case, loss, gradient)
    u = case.ref - stats.log_probs
    expected = -u if estimator["kl_estimator"] == "k1" else u**2 / 2
    if "kl_cap" in estimator:
        assert (case.mask & (u > 0.4)).any()
        expected = torch.where(u > 0.4, 0.4**2 / 2 + 0.4 * (u - 0.4), expected)
    torch.testing.assert_close(stats.kl, torch.where(case.mask, expected, 0.0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", ["gft", "dapo", "cispo"])
@pytest.mark.parametrize(
    ("vocabulary", "options"),
    [(1, {}), (2, {}), (7, {"temperature": 0.6}), (1003, {"softcap": 5.0, "temperature": 1.7}),
     (5001, {"logit_scale": -0.5})],
    ids=str,
)  # fmt: skip
def test_lengths_and_transforms(backend, objective, vocabulary, options):
    case = problem(objective, 3, 2, vocabulary, seed=vocabulary, **options, **PENALTIES)
    loss, gradient = case.run(backend=backend, inplace=vocabulary % 2 == 0)
    assert_right(case, loss, gradient, rtol=5e-5)


def test_the_problem_has_rows_on_both_sides_of_every_clip():
    for objective in WITH_RATIO:
        case = problem(objective)
        _, stats = case.loss(backend="reference", return_stats=True)
        a, low, high = stats.advantages, *CLIPS[objective]
        above = (stats.ratios > 1 + high) & case.mask
        assert (above & (a > 0)).any() and (above & (a < 0)).any()
        below = (stats.ratios < 1 - low) & case.mask
        assert (below & (a > 0)).any() and (below & (a < 0)).any()


def test_the_truth_is_the_slope_of_its_own_value():
    """Finite differences of the oracle: the sign of the KL term and of the entropy bonus hang on it."""
    case = problem("grpo", 2, 2, 7, **PENALTIES)

    def total(z):
        return oracle.policy_losses(
            z, case.targets.flatten(), torch.ones(4), case.advantages.flatten(), objective="grpo",
            old=case.old.flatten(), ref=case.ref.flatten(), **PENALTIES,
        ).sum()  # fmt: skip

    assert torch.autograd.gradcheck(total, case.logits.flatten(0, 1).double().requires_grad_(True))


@pytest.mark.parametrize("objective", WITH_RATIO)
def test_on_policy_the_ratio_is_one_and_its_gradient_flows(backend, objective):
    case = problem(objective, **PENALTIES)
    case.old = None
    (loss, stats), gradient = case.run(backend=backend, return_stats=True)
    assert_right(case, loss, gradient)
    assert stats.ratios[case.mask].eq(1).all() and not stats.clipped.any()
    assert stats.coefficients[case.mask].eq(1).all()


@pytest.mark.parametrize(
    ("objective", "dtype", "terms"),
    [(name, torch.float32, PENALTIES) for name in OBJECTIVES]
    + [("grpo", dtype, PENALTIES) for dtype in DTYPES[1:]]
    + [("dapo", torch.float32, BOUNDS), ("gft", torch.float32, OWN_NUMBERS["gft"])]
    + [("gft", torch.float32, {"beta": 0.3, **ESTIMATORS[1]})],
    ids=str,
)
def test_linear_is_the_loss_over_its_logits(backend, objective, dtype, terms):
    generator = seeded(3)
    case = problem(objective, vocabulary=53, **terms)
    leaves = [torch.randn(*s, generator=generator).to(dtype).requires_grad_(True) for s in [(6, 4, 8), (53, 8), (53,)]]
    wide = [x.detach().float().requires_grad_(True) for x in leaves]
    options = {"return_stats": True, "return_entropy": True, "backend": backend}
    logits = wide[0] @ wide[1].t() + wide[2]
    log_pi = torch.log_softmax(logits.detach(), -1).gather(-1, case.targets[..., None])[..., 0]
    case.old, case.ref = (log_pi + torch.randn(6, 4, generator=generator) * 0.4 for _ in range(2))
    expected, expected_stats = case.loss(logits, **options)
    loss, stats = case.loss(leaves[0], weight=leaves[1], bias=leaves[2], chunk_rows=5, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    tolerance = max(1e-5, torch.finfo(dtype).eps)
    for gradient, truth in zip(
        torch.autograd.grad(loss * 3.7, leaves), torch.autograd.grad(expected * 3.7, wide), strict=True
    ):
        assert gradient.dtype == dtype
        assert float((gradient.float() - truth).norm()) <= tolerance * float(truth.norm())
    for name, value in vars(expected_stats).items():
        torch.testing.assert_close(getattr(stats, name), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("objective", "penalty", "kappa"),
    [("gft", {}, 2.0), ("cispo", {}, 10.0), ("grpo", {}, 60.0), ("dapo", {}, 60.0), ("sapo", {}, 3.2),
     ("gft", {"beta": 10.0, "kl_estimator": 1}, 12.0), ("gft", {"beta": 10.0, "kl_estimator": 2}, 202.0),
     ("gft", {"beta": 10.0}, 202.0), ("gft", {"beta": 10.0, "kl_cap": 0.5}, 12.0)],
    ids=str,
)  # fmt: skip
def test_fp16_products_have_room_for_the_largest_kappa(objective, penalty, kappa):
    """A = -2 at rho = 30 is kappa = -60 for grpo, u = 20 nats of k2 are 10·20 more: times the scaled weight that must
    stay below 65504, yet near it."""
    preset = objectives.PRESETS[objective]
    call = LinearCall(
        torch.zeros(1, 1, 3), torch.zeros(5, 3), None, Credit(torch.zeros(1, dtype=torch.long)),
        Objective(preset.surrogate, clip_high=preset.options.get("clip_high", 0.0), **penalty),
        product_dtype=torch.float16, want_hidden=True,
    )  # fmt: skip
    for weight in (1.0, 1 / 8192):
        credit = RowCredit(torch.tensor([True]), torch.tensor([-2.0]), torch.tensor([weight]))
        unit, weights = chunks._gradient_unit(call, credit)
        assert float(weights * unit) == pytest.approx(weight)
        assert 1024 < float(weights * kappa) < 65504


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.2])
def test_linear_rows_without_advantage_or_weight_stay_home(backend, entropy_coef, reduction):
    """Those without advantage unless a penalty needs them."""
    leaves = [torch.randn(6, 4, 8, requires_grad=True), torch.randn(53, 8, requires_grad=True)]
    case = problem("gft", vocabulary=53, entropy_coef=entropy_coef)
    case.advantages[:2], case.weights = 0.0, torch.tensor([0.0, 1.0, 0.5, 2.0])[torch.randint(4, (6, 4))]
    upstream = torch.randn(6, 4) if reduction == "none" else torch.tensor(UPSTREAM)
    options = {"reduction": reduction, "num_items_in_batch": None, "backend": backend}
    whole = torch.autograd.grad(case.loss(leaves[0] @ leaves[1].t(), **options), leaves, upstream)
    found = torch.autograd.grad(case.loss(leaves[0], weight=leaves[1], chunk_rows=5, **options), leaves, upstream)
    for gradient, truth in zip(found, whole, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-4, atol=1e-5)
    counts = case.mask & (case.weights > 0) & ((case.advantages != 0) | (entropy_coef != 0))
    assert torch.equal(found[0].ne(0).any(-1), counts)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_statistics(backend, objective):
    case = problem(objective, beta=0.3)
    _, stats = case.loss(backend=backend, return_stats=True, return_entropy=True)
    log_pi = torch.log_softmax(case.logits.double(), -1)
    chosen, live = log_pi.gather(-1, case.targets[..., None])[..., 0], case.mask
    expected = {"log_probs": chosen, "entropy": -(log_pi.exp() * log_pi).sum(-1)}
    u = case.ref.double() - chosen
    expected["kl"] = u.exp() - 1 - u
    if objective in WITH_RATIO:
        ratio, a, (low, high) = (chosen - case.old).exp(), case.advantages, CLIPS[objective]
        clipped = ((a > 0) & (ratio > 1 + high)) | ((a < 0) & (ratio < 1 - low))
        capped, x = ratio.clamp(1 - low, 1 + high), torch.where(a > 0, 1.0, 1.05) * (ratio - 1)
        expected["ratios"] = ratio
        expected["clipped"] = {"cispo": ratio != capped, "sapo": ratio < 0}.get(objective, clipped)
        gated = ratio / torch.cosh(x / 2) ** 2
        expected["coefficients"] = {"cispo": capped, "sapo": gated}.get(objective, torch.where(clipped, 0.0, ratio))
    elif objective not in CLIPS:
        assert stats.ratios is None and stats.clipped is None
    for name, truth in expected.items():
        found = getattr(stats, name)
        assert found.shape == live.shape and not found.requires_grad and found[~live].eq(0).all()
        torch.testing.assert_close(found[live].double(), truth[live].double(), rtol=2e-5, atol=2e-6)


# --- edges ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("advantage", [1.5, -1.5])
def test_at_the_edge_of_the_clip_the_gradient_still_flows(backend, advantage):
    """A range of width 0 has rho = 1 on both of its edges; one step of float32 further, the clip is active."""
    logits, targets = torch.randn(2, 9), torch.tensor([3, 4])
    options = {"objective": "grpo", "advantages": torch.full((2,), advantage), "clip_low": 0.0, "clip_high": 0.0}
    for old, flows in ((None, True), (-math.copysign(1e-3, advantage), False), (math.copysign(1e-3, advantage), True)):
        leaf = logits.clone().requires_grad_(True)
        chosen = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
        given = None if old is None else chosen + old
        loss = policy_loss(leaf, targets, old_log_probs=given, reduction="sum", backend=backend, **options)
        loss.backward()
        assert leaf.grad.ne(0).any(1).tolist() == [flows, flows], old
        assert loss.isfinite()


@pytest.mark.parametrize("objective", ["gft", *WITH_RATIO])
@pytest.mark.parametrize("penalties", [{}, {"beta": 0.3}, {"entropy_coef": 0.2}], ids=str)
def test_without_advantage_only_the_penalties_act(backend, objective, penalties):
    """A = 0: such a row is skipped, NaN and all, unless a penalty acts on it."""
    case = problem(objective, **penalties)
    case.advantages[:] = 0.0
    case.old = torch.full_like(case.old, NAN)  # A = 0 decides before the ratio is looked at
    loss, gradient = case.run(backend=backend)
    assert gradient[case.mask].ne(0).any(-1).all() == bool(penalties)
    assert torch.equal(case.run(backend=backend, advantages=case.advantages[:, 0])[1], gradient)
    case.old = torch.zeros_like(case.old)
    assert_right(case, loss, gradient)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_masked_rows_may_hold_anything(backend, objective):
    case = problem(objective, **PENALTIES)
    clean = case.run(backend=backend, return_stats=True, return_entropy=True)
    dead = ~case.mask
    case.logits = torch.where(dead[..., None], NAN, case.logits)
    case.old, case.ref = (torch.where(dead, NAN, x) for x in (case.old, case.ref))
    case.advantages = torch.where(dead, NAN, case.advantages)
    case.targets = torch.where(dead, 10**9, case.targets)
    (loss, stats), gradient = case.run(backend=backend, return_stats=True, return_entropy=True)
    assert torch.equal(loss, clean[0][0]) and torch.equal(gradient, clean[1]) and gradient[dead].eq(0).all()
    for name, value in vars(stats).items():
        expected = getattr(clean[0][1], name)
        assert value is expected is None or torch.equal(value, expected), name


@pytest.mark.parametrize("objective", WITH_RATIO)
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_a_banned_target(backend, objective, advantage):
    """pi = 0, so rho = 0 (on-policy: 1): finite, with the push that the surrogate has there."""
    logits = torch.tensor([[-INF, 0.3, -0.2], [0.1, 0.3, -0.2]])
    targets, advantages = torch.tensor([0, 1]), torch.full((2,), advantage)
    options = {"objective": objective, "advantages": advantages, "reduction": "none", "backend": backend}
    leaf = logits.clone().requires_grad_(True)
    old = torch.tensor([-1.0, -1.0])
    loss = policy_loss(leaf, targets, old_log_probs=old, **options)
    loss.sum().backward()
    expected = -(1 - CLIPS[objective][0]) * advantage if advantage < 0 and objective != "cispo" else 0.0
    gate = 1.0 if advantage > 0 else 1.05
    if objective == "sapo":
        expected = -advantage * 4 / gate / (1 + math.exp(gate))
    assert loss[0].item() == pytest.approx(expected) and leaf.grad[0].eq(0).all()
    assert leaf.grad[1].isfinite().all() and leaf.grad[1].ne(0).any()
    leaf = logits.clone().requires_grad_(True)
    loss = policy_loss(leaf, targets, **options)
    loss[0].backward()
    expected = advantage * (torch.softmax(logits[0], 0) - torch.tensor([1.0, 0, 0]))
    torch.testing.assert_close(leaf.grad[0], expected, rtol=1e-5, atol=1e-7)
    expected = {"cispo": advantage * INF, "sapo": -2 * advantage / gate}.get(objective, -advantage)
    assert loss[0].item() == pytest.approx(expected)


def test_a_banned_token_has_no_entropy_gradient(backend):
    case = problem("dapo", **PENALTIES)
    case.logits[..., 20:90] = -INF
    case.targets = case.targets % 20
    log_pi = torch.log_softmax(case.logits.double(), -1).gather(-1, case.targets[..., None])[..., 0].float()
    case.old, case.ref = log_pi + 0.1, log_pi - 0.3
    loss, gradient = case.run(backend=backend)
    assert gradient[..., 20:90].eq(0).all()
    assert_right(case, loss, gradient)


def test_a_ratio_that_overflows(backend):
    """log rho = 900. A > 0, cispo or sapo: bounded, so finite. grpo with A < 0 has none: reported, in its row only."""
    logits, targets = torch.randn(3, 11), torch.tensor([3, 4, 5])
    advantages, old = torch.tensor([1.0, -1.0, 0.5]), torch.tensor([-900.0, -900.0, -2.0])
    first = {"cispo": None, "sapo": -4.0, "grpo": -1.2}  # the loss of the first row
    for objective in first:
        expected = [True, objective != "grpo", True]
        leaf = logits.clone().requires_grad_(True)
        loss = policy_loss(
            leaf, targets, objective=objective, advantages=advantages, old_log_probs=old, reduction="none",
            backend=backend,
        )  # fmt: skip
        loss.sum().backward()
        assert loss.isfinite().tolist() == expected
        assert leaf.grad.isfinite().all(1).tolist() == expected
        assert objective == "cispo" or (loss[0].item() == pytest.approx(first[objective]) and leaf.grad[0].eq(0).all())


@pytest.mark.parametrize("bounds", [{}, {"delta": 3.0, "kl_cap": 4.0}], ids=["free", "bounded"])
def test_a_token_at_minus_200_nats(backend, bounds):
    """e^200 twice, in the ratio where A < 0 and in the k3 term: with bounds the step is right."""
    logits = torch.tensor([[200.0, 0.0, -1.0], [0.2, 0.0, -1.0]])
    leaf, targets = logits.clone().requires_grad_(True), torch.tensor([1, 1])
    advantages, old, ref = torch.tensor([-1.0, -1.0]), torch.tensor([-400.0, -1.0]), torch.tensor([-0.5, -0.5])
    loss = policy_loss(
        leaf, targets, objective="grpo", advantages=advantages, old_log_probs=old, ref_log_probs=ref, beta=0.1,
        reduction="sum", backend=backend, **bounds,
    )  # fmt: skip
    (loss * UPSTREAM).backward()
    if not bounds:
        assert not loss.isfinite() and not leaf.grad[0].isfinite().all() and leaf.grad[1].isfinite().all()
        return
    losses, truth = oracle.loss_and_gradient(
        logits, targets, [True, True], advantages, torch.ones(2), UPSTREAM, objective="grpo", old=old, ref=ref,
        beta=0.1, **bounds,
    )  # fmt: skip
    torch.testing.assert_close(loss.double(), losses.sum(), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(leaf.grad.double(), truth, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", ["old", "ref", "logits"])
def test_a_bad_live_row_is_reported_in_that_row_only(backend, bad):
    case = problem("grpo", **PENALTIES)
    case.advantages[1] = 0.5
    good_loss, good = case.run(reduction="none", num_items_in_batch=None, backend=backend)
    case.mask[3, 2] = True
    if bad == "logits":
        case.logits[3, 2, 7] = NAN
    else:
        getattr(case, bad)[3, 2] = NAN
        if case.logits.device.type == "cpu":  # where looking at them costs nothing
            with pytest.raises(ValueError, match=rf"{bad}_log_probs must be finite, got nan at position 14; mask"):
                case.run(reduction="none", num_items_in_batch=None, backend=backend)
            return
    loss, gradient = case.run(reduction="none", num_items_in_batch=None, backend=backend)
    here = torch.zeros_like(case.mask)
    here[3, 2] = True
    assert torch.equal(loss.isnan(), here) and gradient[3, 2].isnan().all()
    assert torch.equal(gradient[~here], good[~here]) and torch.equal(loss[~here], good_loss[~here])


@pytest.mark.parametrize("target", [0, 1])
def test_an_entropy_bonus_on_peaked_rows(backend, target):
    """One token has all but 1e-2 to 1e-9 of the mass: what is left of H and of the gradient is right to its digits."""
    logits = torch.randn(15, 1003, generator=seeded(0))
    logits[:, 0] = torch.linspace(12.0, 28.0, 15)
    targets, advantages = torch.full((15,), target), torch.zeros(15)
    leaf = logits.clone().requires_grad_(True)
    options = {"reduction": "sum", "backend": backend, "return_stats": True, "return_entropy": True}
    loss, stats = policy_loss(leaf, targets, advantages=advantages, entropy_coef=0.3, **options)
    (loss * UPSTREAM).backward()
    _, truth = oracle.loss_and_gradient(
        logits, targets, [True] * 15, advantages, torch.ones(15), UPSTREAM, objective="gft", entropy_coef=0.3
    )
    size = truth.abs().amax(-1, keepdim=True)
    assert ((leaf.grad.double() - truth).abs() <= 3e-6 * size).all()
    log_pi = torch.log_softmax(logits.double(), -1)
    torch.testing.assert_close(stats.entropy.double(), -(log_pi.exp() * log_pi).sum(-1), rtol=3e-6, atol=5e-7)


def test_entropy_is_never_negative(backend):
    """A certain row, also where the mass is a rounding away from 1."""
    logits = torch.zeros(64, 17)
    logits[:, 3] = torch.linspace(0.0, 120.0, 64)
    _, stats = policy_loss(
        logits, torch.arange(64) % 17, advantages=torch.ones(64), return_stats=True, return_entropy=True,
        backend=backend,
    )  # fmt: skip
    assert (stats.entropy >= 0.0).all()


@pytest.mark.parametrize("entropy_coef", [0.0, 0.5, 1e-3])
def test_fp16_survives_a_gradient_scaler(backend, entropy_coef):
    """At weight 1/8192 an fp16 gradient would underflow before the scaler's 65536 reaches it."""
    case = problem("gft", 1, 2, 1003, torch.float16, std=1.0, tau=0.0, entropy_coef=entropy_coef)
    case.mask[:], case.advantages[:] = True, torch.tensor([[1.0, 0.0]])
    _, gradient = case.run(65536.0, num_items_in_batch=8192, backend=backend)
    _, truth = case.truth(65536.0, torch.full((2,), 1 / 8192, dtype=torch.float64))
    live = truth.ne(0).any(-1)
    assert gradient[live].eq(0).float().mean() < 0.02
    size = truth.abs().amax(-1, keepdim=True)
    assert ((gradient.double() - truth).abs() <= 2.0**-10 * truth.abs() + 1e-6 * size + 2.0**-24).all()
