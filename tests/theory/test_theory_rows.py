"""docs/formulas.md, sections 4, 6 and 7: one row of logits. The running state, the coefficient, loss and gradient."""

from random import Random

import pytest
import torch
from tiny_policy import TOKEN_PROBS_QT, TOKEN_SCORES_QTP, cosine, f64, jacobian, token_log_probs
from torch.nn.functional import log_softmax

from gft_kernels import formulas

EMPTY = (formulas.NEG_INF, 0.0)
LOGITS_RV = torch.tensor(
    [[2.0, -1.0, 0.5, 0.0, -3.0], [-0.7, 4.0, 0.1, 1.2, 0.3], [9.0, 0.0, -1.0, 0.5, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]],
    dtype=torch.float64,
)
TARGETS_R = torch.tensor([1, 3, 0, 2])
ROWS = torch.arange(4)
EXPERT = 5  # a response the policy gives 1.5 % of its mass


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def target_log_probs(logits_RV):
    return log_softmax(logits_RV, 1)[ROWS, TARGETS_R]


# --- section 6: the running state, F1 to F3 --------------------------------------------------------------------------


def a_state(random: Random):
    """(top, mass) as F1 and F2 can produce it: mass >= 1 in units of e^top, or the empty state."""
    top = random.choice([random.uniform(-1e4, 1e4), random.uniform(-2.0, 2.0), 0.0])
    return random.choice([EMPTY, (top, 1.0), (top, 10 ** random.uniform(0.0, 6.0))])


def a_row(random: Random, longest: int, banned: bool) -> list[float]:
    choices = [lambda: random.uniform(-300, 300), lambda: random.uniform(-2, 2)] + [lambda: formulas.NEG_INF] * banned
    return [random.choice(choices)() for _ in range(random.randint(1, longest))]


def merged(a, b):
    return tuple(formulas.merge(*map(f64, a), *map(f64, b)))


def fold(logits):
    """F1 from left to right."""
    top, mass = map(f64, EMPTY)
    for logit in logits:
        top, mass = formulas.observe(top, mass, f64(logit))
    return top, mass


def row_log_prob(logits, target):
    """F3: the target against the state of all the others."""
    return formulas.log_prob(f64(logits[target]), *fold(logits[:target] + logits[target + 1 :]))


def same(a, b):
    close(f64(a[0]), f64(b[0]), 0.0)
    close(f64(a[1]), f64(b[1]))


def test_merge_is_a_commutative_monoid():
    for seed in range(150):
        random = Random(seed)
        a, b, c = (a_state(random) for _ in range(3))
        same(merged(merged(a, b), c), merged(a, merged(b, c)))
        same(merged(a, b), merged(b, a))
        same(merged(a, EMPTY), a)
        same(merged(EMPTY, a), a)


def test_any_split_of_a_row_gives_its_log_sum_exp():
    for seed in range(60):
        random = Random(seed)
        logits, cut = a_row(random, 12, banned=True), random.randint(0, 12)
        top, mass = formulas.merge(*fold(logits[:cut]), *fold(logits[cut:]))
        close(top + mass.log(), f64(logits).logsumexp(0))


def test_log_prob_is_minus_softplus_of_the_others_log_odds():
    for seed in range(60):
        random = Random(seed)
        logits = a_row(random, 8, banned=False)
        target = random.randrange(len(logits))
        close(row_log_prob(logits, target), log_softmax(f64(logits), 0)[target])


def test_log_prob_at_infinite_logits():
    banned, nan = formulas.NEG_INF, float("nan")
    assert float(row_log_prob([0.3, banned, banned], 0)) == 0.0  # nothing else is allowed
    assert float(row_log_prob([banned, 1.0], 0)) == banned
    for row in (
        [banned, banned],
        [0.0, nan],
        [nan, 0.0],
        [-banned, 0.0],
        [0.0, -banned],
    ):  # no distribution: NaN, in this row only
        assert row_log_prob(row, 0).isnan(), row


def test_offset_of_ten_thousand_costs_no_digits():
    """float32 logits in steps of 1/64, exact with and without the offset; top + log mass would round to 1e-3."""
    logits = torch.tensor([0.0, -1.0 / 64, 2.25, -3.5])
    truth = log_softmax(logits.double(), 0)[1]
    shifted = logits + 1e4
    others = shifted[[0, 2, 3]]
    others_mass = torch.exp(others - others.max()).sum()
    assert abs(formulas.log_prob(shifted[1], others.max(), others_mass) - truth) < 1e-6
    whole_mass = torch.exp(shifted - shifted.max()).sum()
    assert abs(shifted[1] - (shifted.max() + whole_mass.log()) - truth) > 1e-5


def test_a_certain_target_keeps_its_digits():
    """float32, 1 - pi = 2e-9: in the whole row's mass, 1 + 2e-9 is 1; the others' own state still holds it."""
    target, others_top, others_mass = torch.tensor([20.0, 0.0, 1.0]).unbind()
    truth = -torch.log1p(torch.exp(f64(-20.0)))
    assert float(formulas.log_prob(target, others_top, others_mass)) == pytest.approx(float(truth), rel=1e-6)
    top, mass = formulas.observe(others_top, others_mass, target)
    assert float((target - top) - mass.log()) == 0.0


# --- section 4: the coefficient, F4 ----------------------------------------------------------------------------------


def coefficient(pi, tau):
    return float(formulas.coefficient(f64(pi).log(), f64(tau)))


@pytest.mark.parametrize("tau", [0.25, 0.5, 0.7])
def test_coefficient_at_its_edges(tau):
    assert coefficient(tau, tau) == 1.0  # `<`, not `<=`
    assert coefficient(tau * (1 - 1e-12), tau) == pytest.approx(tau)
    assert coefficient(0.0, tau) == 0.0
    assert coefficient(1.0, tau) == 1.0


def test_tau_zero_is_sft_and_tau_one_is_dft():
    for pi in (0.0, 1e-300, 0.3, 0.7, 1.0 - 1e-16, 1.0):
        assert coefficient(pi, 0.0) == 1.0
        assert coefficient(pi, 1.0) == pytest.approx(pi, rel=1e-12)


def test_positive_rectification_is_a_threshold_per_row():
    advantage = f64([2.0, 0.0, -1.0])
    assert formulas.row_tau(advantage, f64(0.7), False).tolist() == [0.7, 0.0, 0.0]
    assert formulas.row_tau(advantage, f64(0.7), True).tolist() == [0.7, 0.7, 0.7]


def test_no_product_of_zero_and_infinity():
    """pi = 0: a rectified row ends at 0; a row with C = 1 reports inf and keeps the gradient of cross-entropy."""
    log_pi = f64(formulas.NEG_INF)
    for tau, loss, gradient in [(0.7, 0.0, 0.0), (0.0, float("inf"), -1.0)]:
        kappa = formulas.kappa(f64(1.0), formulas.coefficient(log_pi, f64(tau)))
        assert float(formulas.token_loss(log_pi, kappa)) == loss
        assert float(formulas.dlogit_target(log_pi, kappa)) == gradient
    dead = formulas.kappa(f64(0.0), f64(float("nan")))
    assert float(formulas.token_loss(f64(float("nan")), dead)) == 0.0
    assert float(formulas.dlogit_other(f64(float("nan")), dead)) == 0.0


def test_dft_climbs_the_token_probability_itself():
    """pi·(1/pi) = 1: token by token the policy gradient with reward 1[a = y]; not so for a whole response."""
    dft_P = (TOKEN_PROBS_QT[EXPERT, :, None] * TOKEN_SCORES_QTP[EXPERT]).sum(0)
    close(dft_P, jacobian(lambda theta: token_log_probs(theta)[EXPERT].exp().sum()), 1e-12)
    response_P = jacobian(lambda theta: token_log_probs(theta)[EXPERT].sum().exp())
    assert cosine(dft_P, response_P) < 0.999


@pytest.mark.parametrize(("tau", "peak"), [(0.0, 1.0), (0.3, 0.7), (0.7, 0.3), (1.0, 0.25)])
def test_largest_pull_on_a_target_logit(tau, peak):
    """sup over pi of C(pi)·(1 - pi) = max(1 - tau, 1/4) for tau >= 1/2; at pi = tau it jumps by 1/tau."""
    pi = torch.linspace(0.0, 1.0, 100_001, dtype=torch.float64)
    threshold = f64(tau)
    pull = formulas.coefficient(pi.log(), threshold) * (1.0 - pi)
    assert float(pull.max()) == pytest.approx(peak, abs=1e-5)


def test_rectify_all_spares_the_wrong_token_and_hits_the_shared_one():
    """A failing response: a shared confident token (pi = .9), then the mistake (pi = .05)."""
    log_pi, advantage = f64([0.9, 0.05]).log(), f64([-1.0, -1.0])
    push = {}
    for rectify in ("all", "positive"):
        tau = formulas.row_tau(advantage, f64(0.7), rectify == "all")
        kappa = formulas.kappa(advantage, formulas.coefficient(log_pi, tau))
        push[rectify] = formulas.dlogit_target(log_pi, kappa)
    close(push["all"], f64([0.1, 0.0475]), 1e-12)
    close(push["positive"], f64([0.1, 0.95]), 1e-12)


# --- section 7: loss and gradient, F6 and F7 -------------------------------------------------------------------------


def f7(raw_RV, scale_R, transform=(1.0, 0.0, 1.0)):
    """The document's F7 with its chain rule, from the library's functions."""
    logits_RV = formulas.transform(raw_RV, *transform)
    target_R = logits_RV[ROWS, TARGETS_R]
    others_RV = logits_RV.clone()
    others_RV[ROWS, TARGETS_R] = formulas.NEG_INF
    others_top_R = others_RV.max(1).values
    others_mass_R = torch.exp(others_RV - others_top_R[:, None]).sum(1)
    log_pi_R = formulas.log_prob(target_R, others_top_R, others_mass_R)
    top_R, mass_R = formulas.observe(others_top_R, others_mass_R, target_R)
    log_probs_RV = (logits_RV - top_R[:, None]) - mass_R.log()[:, None]
    gradient_RV = formulas.dlogit_other(log_probs_RV, scale_R[:, None])
    gradient_RV[ROWS, TARGETS_R] = formulas.dlogit_target(log_pi_R, scale_R)
    return gradient_RV * formulas.transform_slope(raw_RV, *transform), log_pi_R


@pytest.mark.parametrize("tau", [0.0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("rectify", ["all", "positive"])
@pytest.mark.parametrize(
    "transform", [(1.0, 0.0, 1.0), (0.5, 0.0, 1.0), (1.0, 3.0, 1.0), (-1.5, 2.0, 0.7), (2.0, 0.0, 1.6)]
)
def test_f7_is_the_gradient_of_f6(tau, rectify, transform):
    logit_scale, softcap, temperature = transform
    advantages_R, weights_R = f64([1.3, -0.8, 0.4, -2.0]), f64([0.11, 0.7, 0.3, 2.5])
    raw_RV = LOGITS_RV.clone().requires_grad_()

    scaled_RV = raw_RV * logit_scale  # the textbook, by autograd, with C detached
    capped_RV = softcap * torch.tanh(scaled_RV / softcap) if softcap else scaled_RV
    log_pi_R = target_log_probs(capped_RV / temperature)
    pi_R = log_pi_R.detach().exp()
    spared_R = (pi_R >= tau) | ((advantages_R <= 0) & (rectify == "positive"))
    coefficients_R = torch.where(spared_R, 1.0, pi_R)
    (weights_R * -advantages_R * coefficients_R * log_pi_R).sum().backward()

    thresholds_R = formulas.row_tau(advantages_R, f64(tau), rectify == "all")
    kappa_R = formulas.kappa(advantages_R, formulas.coefficient(log_pi_R.detach(), thresholds_R))
    gradient_RV, log_probs_R = f7(LOGITS_RV, weights_R * kappa_R, transform)
    close(gradient_RV, raw_RV.grad)
    close(formulas.token_loss(log_probs_R, kappa_R), (-advantages_R * coefficients_R * log_pi_R).detach())


def test_softcap_slope_near_saturation():
    """float32, x/c = 9: tanh rounds to 1, so 1 - tanh^2 would be 0; 4e/(1 + e)^2 keeps every digit."""
    raw, softcap = torch.tensor(270.0), 30.0
    truth = 1.0 / torch.cosh(f64(9.0)) ** 2
    assert float(formulas.transform_slope(raw, 1.0, softcap, 1.0)) == pytest.approx(float(truth), rel=1e-5)
    assert float(1.0 - torch.tanh(raw / softcap) ** 2) != pytest.approx(float(truth), rel=0.1)
