"""docs/formulas.md, sections 2, 3 and 10: SFT, the group advantage and reductions as policy gradients.

Checked by enumerating all 9 responses of a 3-token policy. Advantages are float32, hence tolerances near 1e-6.
"""

import math
from dataclasses import replace

import pytest
import torch
from tiny_policy import (
    EXPERT,
    PROBS_Q,
    RESPONSES,
    REWARDS_Q,
    SCORES_QP,
    THETA_P,
    TOKEN_PROBS_QT,
    TOKEN_SCORES_QTP,
    closed_scale,
    cosine,
    expected_advantages,
    expected_gradient,
    f64,
    jacobian,
    mixed_gradient,
    scale,
    token_log_probs,
    true_gradient,
)

from gft_kernels import gft_loss, group_advantages
from gft_kernels.advantages import credit_rows
from gft_kernels.options import Credit

BINARY = "0 / 1"
GRADED = [name for name in REWARDS_Q if name != BINARY]
EVERY_K = range(2, 17)


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance)


def sft_gradient(response):
    return jacobian(lambda theta: token_log_probs(theta)[response].sum())


# --- section 2: SFT as a policy gradient -----------------------------------------------------------------------------


@pytest.mark.parametrize("response", range(len(RESPONSES)))
def test_sft_is_a_policy_gradient_with_reward_one_over_pi(response):
    reward_Q = torch.zeros(len(RESPONSES)).double()
    reward_Q[response] = 1.0 / PROBS_Q[response]
    close((PROBS_Q * reward_Q) @ SCORES_QP, sft_gradient(response), 1e-12)
    close(true_gradient(reward_Q), sft_gradient(response), 1e-12)


def test_the_same_identity_holds_token_by_token():
    probs_V = torch.softmax(THETA_P[:3], 0)
    scores_VP = torch.eye(3).double() - probs_V  # d log pi_a / d z
    for target in range(3):
        reward_V = torch.eye(3).double()[target] / probs_V[target]
        close((probs_V * reward_V) @ scores_VP, scores_VP[target], 1e-12)


@pytest.mark.parametrize("response", range(len(RESPONSES)))
def test_variance_of_the_one_sample_estimator_grows_as_one_over_pi(response):
    """reward·score is 0 with probability 1 - pi and score/pi with probability pi."""
    pi, score_P = PROBS_Q[response], SCORES_QP[response]
    estimates_QP = torch.zeros_like(SCORES_QP)
    estimates_QP[response] = score_P / pi
    variance = PROBS_Q @ (estimates_QP - PROBS_Q @ estimates_QP).square().sum(1)
    close(variance, (1.0 / pi - 1.0) * score_P.square().sum(), 1e-9)


def test_the_average_over_a_dataset_has_reward_q_over_pi():
    """Demonstrations drawn from q: E over q of the SFT gradient is the policy gradient of the reward q(o) / pi(o)."""
    q_Q = torch.softmax(f64([0.3, -1.0, 2.0, 0.1, 0.0, 1.2, -0.4, 0.9, -2.0]), 0)
    expected_P = sum(q_Q[o] * sft_gradient(o) for o in range(len(RESPONSES)))
    close(true_gradient(q_Q / PROBS_Q), expected_P, 1e-12)


@pytest.mark.parametrize("response", [0, 5])
def test_the_reward_one_over_pi_must_be_held_constant(response):
    """Differentiated as well it is worth 1 whatever the policy does: there is nothing to climb."""

    def value(theta):
        pi = token_log_probs(theta)[response].sum().exp()
        return pi * (1.0 / pi)

    close(jacobian(value), torch.zeros(12).double(), 1e-12)
    assert sft_gradient(response).norm() > 0.3


def test_the_token_identity_stands_on_the_experts_prefix():
    """Token by token the expectation is over the next token alone; before it stands what the expert wrote."""
    first, second = RESPONSES[EXPERT]
    here = [q for q, (a, _) in enumerate(RESPONSES) if a == first]
    probs_V = TOKEN_PROBS_QT[here, 1]
    reward_V = f64([float(b == second) for b in range(3)]) / probs_V
    close((probs_V * reward_V) @ TOKEN_SCORES_QTP[here, 1], TOKEN_SCORES_QTP[EXPERT, 1], 1e-12)
    on_policy = sum(PROBS_Q[q] * (RESPONSES[q][1] == second) / TOKEN_PROBS_QT[q, 1] * TOKEN_SCORES_QTP[q, 1]
                    for q in range(len(RESPONSES)))  # fmt: skip
    assert cosine(on_policy, TOKEN_SCORES_QTP[EXPERT, 1]) < 0.5, "on the policy's own prefixes it is another gradient"


# --- section 3: the group advantage, F5 ------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", ["mean", "leave-one-out", "std"])
@pytest.mark.parametrize("k", [2, 3, 4])
def test_counting_levels_equals_enumerating_groups(k, normalize):
    """The multinomial shortcut of tiny_policy against all 9^K groups."""
    for rewards_Q in REWARDS_Q.values():
        close(mixed_gradient(rewards_Q, [], k, normalize), expected_gradient(rewards_Q, k, normalize), 1e-12)


@pytest.mark.parametrize("rewards", REWARDS_Q)
@pytest.mark.parametrize("k", EVERY_K)
def test_mean_baseline_shrinks_the_gradient_and_leave_one_out_does_not(rewards, k):
    truth_P = true_gradient(REWARDS_Q[rewards])
    close(expected_gradient(REWARDS_Q[rewards], k, "mean"), truth_P * (k - 1) / k, 1e-6)
    close(expected_gradient(REWARDS_Q[rewards], k, "leave-one-out"), truth_P, 1e-6)


@pytest.mark.parametrize("k", EVERY_K)
def test_std_rescales_binary_rewards_and_keeps_their_direction(k):
    truth_P = true_gradient(REWARDS_Q[BINARY])
    estimate_P = expected_gradient(REWARDS_Q[BINARY], k, "std")
    assert cosine(estimate_P, truth_P) == pytest.approx(1.0, abs=1e-9)
    success = float(PROBS_Q @ REWARDS_Q[BINARY])
    assert scale(estimate_P, truth_P) == pytest.approx(std_scale(success, k), rel=1e-5)


def std_scale(success, k):
    """c(K, p) = E[A | R = 1] - E[A | R = 0], from the library's advantages."""
    probs_L = f64([1.0 - success, success])
    low, high = expected_advantages(f64([0.0, 1.0]), probs_L, k, "std")
    return float(high - low)


@pytest.mark.parametrize("success", [0.01, 0.1, 0.25, 0.5, 0.9])
def test_std_scale_depends_on_the_query(success):
    """1/sqrt 2 for every p at K = 2; 1/sqrt(p (1 - p)) as K grows."""
    assert std_scale(success, 2) == pytest.approx(math.sqrt(0.5), rel=1e-5)
    gaps = [abs(std_scale(success, k) - 1.0 / math.sqrt(success * (1.0 - success))) for k in (2, 16, 128)]
    assert gaps == sorted(gaps, reverse=True)


@pytest.mark.parametrize("success", [0.01, 0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("k", [2, 3, 8, 16])
def test_std_scale_has_a_closed_form(success, k):
    """sqrt((K-1)/K)·E[sqrt(h (K-h))] / (K p (1-p)), h of K solved; at K = 2 it is 1/sqrt 2 whatever p is."""
    assert std_scale(success, k) == pytest.approx(closed_scale(k, success), rel=2e-5)
    assert closed_scale(2, success) == pytest.approx(math.sqrt(0.5), rel=1e-12)


def test_std_scale_reaches_its_limit():
    assert std_scale(0.25, 512) == pytest.approx(1.0 / math.sqrt(0.25 * 0.75), rel=0.01)


@pytest.mark.parametrize("rewards", GRADED)
@pytest.mark.parametrize("k", EVERY_K)
def test_std_turns_the_direction_of_graded_rewards(rewards, k):
    estimate_P = expected_gradient(REWARDS_Q[rewards], k, "std")
    assert 0.8 < cosine(estimate_P, true_gradient(REWARDS_Q[rewards])) < 0.99


@pytest.mark.parametrize("k", EVERY_K)
def test_size_of_std_normalised_advantages(k):
    """Sum 0, sum of squares K - 1, at most (K - 1)/sqrt K, and unchanged by R -> 7 R + 3."""
    rewards_K = torch.zeros(k)
    rewards_K[0] = 1.0
    advantages_K = group_advantages(rewards_K, group_size=k)
    assert float(advantages_K.sum()) == pytest.approx(0.0, abs=1e-5)
    assert float(advantages_K.square().sum()) == pytest.approx(k - 1, rel=1e-4)
    assert float(advantages_K[0]) == pytest.approx((k - 1) / math.sqrt(k), rel=1e-4)
    close(group_advantages(7.0 * rewards_K + 3.0, group_size=k), advantages_K, 1e-4)


@pytest.mark.parametrize(("normalize", "tau"), [("leave-one-out", 0.0), ("mean", 0.0), ("std", 0.7)])
def test_gft_loss_delivers_these_gradients(normalize, tau):
    """The public loss over all 81 groups of two, each weighted by its probability, walked back to the parameters."""
    pairs_GK = torch.cartesian_prod(torch.arange(9), torch.arange(9))
    responses_ST = torch.tensor(RESPONSES)[pairs_GK.flatten()]
    theta_P = THETA_P.float().requires_grad_()
    second_SV = theta_P[3:].view(3, 3)[responses_ST[:, 0]]
    logits_STV = torch.stack([theta_P[:3].expand_as(second_SV), second_SV], 1)
    rewards_Q = REWARDS_Q[BINARY]
    loss_ST = gft_loss(
        logits_STV,
        responses_ST,
        rewards=rewards_Q[pairs_GK.flatten()],
        group_size=2,
        tau=tau,
        normalize=normalize,
        reduction="none",
    )
    probs_S = PROBS_Q[pairs_GK].prod(1).repeat_interleave(2).float()
    (loss_ST.sum(1) * probs_S / 2).sum().backward()
    close(-theta_P.grad.double(), mixed_gradient(rewards_Q, [], 2, normalize, tau), 1e-6)


def test_equal_rewards_give_exactly_zero_where_the_formula_gives_noise():
    """The float32 mean of equal rewards may differ from them, and 1e-6 in the denominator magnifies the rest."""
    noise = 0.0
    for reward, k in [(0.1, 3), (0.7, 6), (1 / 3, 7), (1e-3, 11)]:
        rewards_K = torch.full((k,), reward)
        noise = max(noise, float(((rewards_K - rewards_K.sum() / k) / (rewards_K.std() + 1e-6)).abs().max()))
        for normalize in ("std", "mean", "leave-one-out"):
            advantages_K = group_advantages(rewards_K, group_size=k, normalize=normalize)
            assert advantages_K.eq(0.0).all(), (reward, k, normalize)
    assert noise > 1e-3


def test_a_group_of_one():
    close(group_advantages(torch.tensor([0.3, 1.0]), group_size=1), torch.tensor([0.3, 1.0]), 0.0)
    close(group_advantages(torch.tensor([0.3, 1.0]), group_size=1, singleton="zero"), torch.zeros(2), 0.0)


# --- section 10: reductions ------------------------------------------------------------------------------------------


def test_denominators_under_accumulation():
    """10 live rows in micro-batches of 7 and 3: weights agree with the whole batch only if N is passed."""
    targets_R = torch.zeros(10, dtype=torch.long)
    whole = credit_rows(Credit(targets_R)).weights_R
    parts = [targets_R[:7], targets_R[7:]]
    given = torch.cat([credit_rows(Credit(part, num_items=torch.tensor(10.0))).weights_R for part in parts])
    counted = torch.cat([credit_rows(Credit(part)).weights_R for part in parts]) / 2  # a mean of micro-batch means
    close(given, whole, 1e-8)
    assert float(counted[7] / whole[7]) == pytest.approx(10 / 6)  # tokens of the short micro-batch count for more


def test_denominators_under_data_parallelism():
    """7 and 3 rows on two ranks whose gradients are averaged: N / 2 on each rank gives every row 1 / N."""
    for rows in (7, 3):
        weights_R = credit_rows(Credit(torch.zeros(rows, dtype=torch.long), num_items=torch.tensor(10.0 / 2))).weights_R
        close(weights_R / 2, torch.full((rows,), 1.0 / 10), 1e-8)


def test_rows_without_credit_still_count():
    credit = Credit(torch.zeros(8, dtype=torch.long), rewards_S=torch.tensor([1.0, 1, 0, 1]), group_size=2)
    rows = credit_rows(replace(credit, tokens_per_response=2))
    assert rows.advantages_R[:4].eq(0.0).all() and rows.advantages_R[4:].ne(0.0).all()
    close(rows.weights_R, torch.full((8,), 1.0 / 8), 0.0)


def test_a_counted_denominator_turns_the_direction_when_lengths_vary():
    """Let token 0 end the response: lengths 1 and 2; two responses a batch; A = R (no group, no coefficient)."""
    lengths_Q = f64([1.0 if first == 0 else 2.0 for first, _ in RESPONSES])
    rewards_Q = f64([0.5 if first == 0 else float(second == 1) for first, second in RESPONSES])
    scores_QP = TOKEN_SCORES_QTP[:, 0] + (lengths_Q - 1.0)[:, None] * TOKEN_SCORES_QTP[:, 1]
    batch_lengths_QQ = lengths_Q[:, None] + lengths_Q[None, :]
    truth_P = (PROBS_Q * rewards_Q) @ scores_QP
    token_mean_P = (PROBS_Q * rewards_Q * ((1.0 / batch_lengths_QQ) @ PROBS_Q)) @ scores_QP
    sequence_mean_P = (PROBS_Q * rewards_Q / lengths_Q) @ scores_QP
    assert 0.2 < cosine(sequence_mean_P, truth_P) < cosine(token_mean_P, truth_P) < 0.9
