"""docs/formulas.md, section 5: what a group of given and sampled responses climbs, exactly, and three changes to it.

Every expectation is a sum over all groups of the 3-token policy. Advantages are float32, hence tolerances near 1e-6.
"""

import pytest
import torch
from tiny_policy import (
    EXPERT,
    PROBS_Q,
    REWARDS_Q,
    SCORES_QP,
    TOKEN_PROBS_QT,
    TOKEN_SCORES_QTP,
    closed_mixture,
    cosine,
    f64,
    jacobian,
    mixed_credit,
    mixed_gradient,
    rectified,
    true_gradient,
    weighted_scores,
)

REWARD_Q = REWARDS_Q["0 / 1"]
J = float(PROBS_Q @ REWARD_Q)
TRUTH_P = true_gradient(REWARD_Q)
GIVEN, SAMPLED, RAISED, LOWERED = 0, 1, 0, 1  # of mixed_credit

MIXTURES = [([EXPERT], 3), ([EXPERT], 4), ([EXPERT, 1], 4), ([EXPERT, 1, 6, EXPERT], 1), ([EXPERT, 1, 6, 0], 4)]


def close(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance)


def counts(offline):
    """(Q,): how often each response is given."""
    return torch.bincount(torch.tensor(offline), minlength=len(PROBS_Q)).double()


# --- what a mixed group climbs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("offline", "sampled"), MIXTURES)
def test_a_mixed_group_reinforces_its_samples_and_imitates_by_the_failure_rate(offline, sampled):
    """Leave-one-out: n grad J + the sum over given ones of (R - the others' expected mean)·grad log pi, over K."""
    k, given = len(offline) + sampled, REWARD_Q[offline]
    others_M = (given.sum() - given + sampled * J) / (k - 1)
    expected_P = (sampled * TRUTH_P + (given - others_M) @ SCORES_QP[offline]) / k
    close(mixed_gradient(REWARD_Q, offline, sampled, "leave-one-out"), expected_P)
    close(mixed_gradient(REWARD_Q, offline, sampled, "mean"), expected_P * (k - 1) / k)
    if given.eq(1.0).all():
        imitation_P = len(offline) * sampled / (k - 1) * (1.0 - J) * SCORES_QP[offline].mean(0)
        close(expected_P, (sampled * TRUTH_P + imitation_P) / k, 1e-12)


@pytest.mark.parametrize(("offline", "sampled"), MIXTURES)
def test_division_by_the_std_rescales_both_parts_of_a_mixed_group(offline, sampled):
    k, right = len(offline) + sampled, int(REWARD_Q[offline].sum())
    slope, high, low = closed_mixture(right, len(offline) - right, sampled, J)
    advantages_M = torch.where(REWARD_Q[offline] == 1.0, f64(high), f64(low))
    expected_P = (sampled * slope * TRUTH_P + advantages_M @ SCORES_QP[offline]) / k
    close(mixed_gradient(REWARD_Q, offline, sampled, "std"), expected_P)


def test_imitation_fades_as_a_prompt_is_solved_and_reinforcement_does_not():
    slopes, gates, _ = zip(*(closed_mixture(4, 0, 4, p) for p in (0.01, 0.1, 0.3, 0.6, 0.9, 0.99)), strict=True)
    assert list(gates) == sorted(gates, reverse=True) and gates[-1] < 0.02 < 0.9 < gates[0]
    assert min(slopes) > 0.8


@pytest.mark.parametrize(("offline", "sampled"), MIXTURES)
@pytest.mark.parametrize("normalize", ["std", "mean", "leave-one-out"])
def test_mixed_groups_are_no_policy_gradient(offline, sampled, normalize):
    """Not even up to scale, whichever baseline: the expert is always there, however rarely the policy says it."""
    assert 0.3 < cosine(mixed_gradient(REWARD_Q, offline, sampled, normalize), TRUTH_P) < 0.95


@pytest.mark.parametrize("tau", [0.3, 0.7, 1.0])
def test_the_coefficient_turns_the_on_policy_gradient(tau):
    assert cosine(mixed_gradient(REWARD_Q, [], 4, tau=0.0), TRUTH_P) == pytest.approx(1.0, abs=1e-9)
    assert 0.9 < cosine(mixed_gradient(REWARD_Q, [], 4, tau=tau), TRUTH_P) < 0.999


def test_under_the_coefficient_a_baseline_is_no_longer_free():
    """E[grad log pi] = 0 hides a baseline; E[C·grad log pi] is not 0. For DFT it is the gradient of sum pi^2 / 2."""
    first = TOKEN_SCORES_QTP[:, 0]
    close(PROBS_Q @ first, torch.zeros(12).double(), 1e-12)
    half_collision_P = jacobian(lambda theta: torch.softmax(theta[:3], 0).square().sum() / 2)
    close((PROBS_Q * TOKEN_PROBS_QT[:, 0]) @ first, half_collision_P, 1e-12)
    assert half_collision_P.norm() > 0.1


def test_under_the_coefficient_the_baseline_of_a_mixed_group_sharpens():
    """Leave-one-out, C = pi: each sample climbs E[R·C·grad log pi] - b·E[C·grad log pi], b the others' mean reward."""
    offline, sampled = [EXPERT, 1], 4
    k, b = 6, (2 + 3 * J) / 5
    sharpening_P = weighted_scores(PROBS_Q, rectified(1.0))
    first_P = jacobian(lambda theta: torch.softmax(theta[:3], 0).square().sum() / 2)
    close(weighted_scores(PROBS_Q, TOKEN_PROBS_QT * f64([1.0, 0.0])), first_P, 1e-12)
    samples_P = weighted_scores(PROBS_Q * REWARD_Q, rectified(1.0)) - b * sharpening_P
    imitation_P = weighted_scores(
        torch.bincount(torch.tensor(offline), minlength=9) * 4 / 5 * (1.0 - J), rectified(1.0)
    )
    close(mixed_gradient(REWARD_Q, offline, sampled, "leave-one-out", 1.0), (sampled * samples_P + imitation_P) / k)
    assert cosine(samples_P, TRUTH_P) < 0.9


# --- three changes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("offline", "sampled"), [([EXPERT], 3), ([EXPERT, 1, 6, 0], 2), ([EXPERT, 0], 4)])
@pytest.mark.parametrize("imitation", [0.0, 1.0, 2.5])
def test_split_advantages_are_a_policy_gradient_and_a_gated_imitation_apart(offline, sampled, imitation):
    """Samples: n grad J exactly. Given ones: imitation·(R - J)·grad log pi each. K and m only divide the sum."""
    credit = mixed_credit(REWARD_Q, offline, sampled, "split", imitation=imitation).sum(1) * (len(offline) + sampled)
    close(weighted_scores(credit[SAMPLED], rectified(0.0)), sampled * TRUTH_P)
    expected_P = imitation * (REWARD_Q[offline] - J) @ SCORES_QP[offline]
    close(weighted_scores(credit[GIVEN], rectified(0.0)), expected_P, 2e-6)


@pytest.mark.parametrize("tau", [0.3, 0.7])
def test_the_coefficient_on_given_responses_alone_leaves_the_samples_unbiased(tau):
    """`rectify` for given rows only: n grad J stays whole; the imitation is C·grad log pi, gated as before."""
    offline, sampled, k = [EXPERT, 1], 4, 6
    credit = mixed_credit(REWARD_Q, offline, sampled, "leave-one-out").sum(1)
    samples_P = weighted_scores(credit[SAMPLED], rectified(0.0))
    close(samples_P, sampled * TRUTH_P / k)
    gate = sampled / 5 * (1.0 - J) / k
    close(
        weighted_scores(credit[GIVEN], rectified(tau)),
        gate * weighted_scores(torch.bincount(torch.tensor(offline), minlength=9).double(), rectified(tau)),
    )
    assert cosine(weighted_scores(credit[SAMPLED], rectified(tau)), TRUTH_P) < 0.99


@pytest.mark.parametrize("gamma", [0.02, 0.1, 1.0])
def test_a_bounded_negative_is_the_gradient_of_a_bounded_loss(gamma):
    """A < 0: kappa = A·pi / (pi + gamma) is that of -A·log(pi + gamma), which has a floor, |A|·log gamma."""
    log_pi = f64([0.0, -0.05, -1.0, -4.0, -60.0]).requires_grad_()
    advantage = -0.8
    loss = -advantage * torch.log(log_pi.exp() + gamma)
    loss.sum().backward()
    pi = log_pi.detach().exp()
    close(log_pi.grad, -advantage * pi / (pi + gamma), 1e-12)
    assert float(loss.detach().min()) >= -advantage * torch.log(f64(gamma)) - 1e-12
    push = pi * (1.0 - pi) / (pi + gamma)  # of the target's logit, per unit of A
    assert float(push[-1]) < 1e-20 and float(push.max()) < 1.0


def test_bounded_negatives_tend_to_the_policy_gradient_as_gamma_falls():
    """On-policy, leave-one-out. The price of a bound: what it takes from the unlikely mistakes."""
    credit = mixed_credit(REWARD_Q, [], 4, "leave-one-out")[SAMPLED]
    errors = []
    for gamma in (1.0, 0.1, 0.01, 1e-9):
        bound_QT = TOKEN_PROBS_QT / (TOKEN_PROBS_QT + gamma)
        gradient_P = weighted_scores(credit[RAISED], rectified(0.0)) + weighted_scores(credit[LOWERED], bound_QT)
        errors.append(float((gradient_P - TRUTH_P).norm() / TRUTH_P.norm()))
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.05 and errors[-1] < 1e-5
