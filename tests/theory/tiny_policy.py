"""A policy small enough to enumerate: 3 tokens, responses of length 2, so 9 responses and every expectation exact.

Shapes: Q = 9 responses, P = 12 parameters (logits), T = 2 tokens, L distinct reward levels, K responses in a group.
Everything is float64, except for the advantages, which the library hands out in float32.
"""

from __future__ import annotations

import itertools
import math

import torch

from gft_kernels import group_advantages


def f64(values):
    return torch.as_tensor(values, dtype=torch.float64)


TOKENS = 3
RESPONSES = list(itertools.product(range(TOKENS), repeat=2))
THETA_P = f64([1.541, -0.293, -2.179, 0.568, -1.084, -1.399, 0.403, 0.838, -0.719, -0.403, -0.597, 0.182])

EXPERT = 5  # a correct response the policy gives 1.5 % of its mass

REWARDS_Q = {
    "0 / 1": f64([0.0, 1, 0, 0, 0, 1, 1, 0, 0]),
    "0 / .1 / 1": f64([0.0, 0.1, 1, 0, 0.1, 1, 0, 0, 0.1]),
    "0 / .3 / 1 / 5": f64([0.0, 0.3, 1, 0, 0.3, 5, 0.3, 0, 1]),
}


def token_log_probs(theta_P):
    """(Q, T): log pi of each token of each response; the second token's logits depend on the first token."""
    first = torch.log_softmax(theta_P[:TOKENS], 0)
    second = torch.log_softmax(theta_P[TOKENS:].view(TOKENS, TOKENS), 1)
    return torch.stack([torch.stack([first[a], second[a, b]]) for a, b in RESPONSES])


def jacobian(function):
    return torch.autograd.functional.jacobian(function, THETA_P)


TOKEN_PROBS_QT = token_log_probs(THETA_P).exp()
PROBS_Q = TOKEN_PROBS_QT.prod(1)
TOKEN_SCORES_QTP = jacobian(token_log_probs)  # grad log pi of each token
SCORES_QP = TOKEN_SCORES_QTP.sum(1)


def true_gradient(rewards_Q):
    """Gradient of J = sum over responses of pi·R, by autograd through the probabilities: no score function used."""
    return jacobian(lambda theta: (token_log_probs(theta).sum(1).exp() * rewards_Q).sum())


def compositions(total, parts):
    """All ways of writing `total` as an ordered sum of `parts` non-negative integers."""
    if parts == 1:
        yield (total,)
        return
    for head in range(total + 1):
        for rest in compositions(total - head, parts - 1):
            yield (head, *rest)


def expected_advantages(levels_L, probs_L, k, normalize):
    """(L,): E[A | the response's reward is this level] for groups of k independent responses, exactly.

    A group matters only through how many of its rewards sit at each level: a multinomial count.
    """
    counts_CL = torch.tensor(list(compositions(k, len(levels_L))))
    groups_CK = torch.stack([levels_L.repeat_interleave(count) for count in counts_CL])
    advantages_CK = (
        group_advantages(groups_CK.flatten().float(), group_size=k, normalize=normalize).view(-1, k).double()
    )
    levels_CK = torch.stack([torch.arange(len(levels_L)).repeat_interleave(count) for count in counts_CL])
    ways_C = [math.factorial(k) // math.prod(math.factorial(n) for n in count) for count in counts_CL.tolist()]
    probs_C = f64(ways_C) * (probs_L ** counts_CL.double()).prod(1)
    total_L = torch.zeros(len(levels_L)).double()
    total_L.scatter_add_(0, levels_CK.flatten(), (probs_C[:, None] * advantages_CK).flatten())
    return total_L / (k * probs_L)


def expected_gradient(rewards_Q, k, normalize):
    """E[(1/K) sum_k A_k·grad log pi(o_k)] over groups of k responses sampled from the policy."""
    levels_L, level_Q = rewards_Q.unique(return_inverse=True)
    probs_L = torch.zeros(len(levels_L)).double().scatter_add(0, level_Q, PROBS_Q)
    return (PROBS_Q * expected_advantages(levels_L, probs_L, k, normalize)[level_Q]) @ SCORES_QP


def mixed_credit(rewards_Q, offline, sampled, normalize="std", **split):
    """(2, 2, Q): E[sum of A / K] of each response, given ones [0] and sampled ones [1], A > 0 [0] and A < 0 [1] apart.

    A group is the fixed `offline` responses and `sampled` draws from the policy. Cost: 9^sampled groups.
    """
    drawn_GN = torch.tensor(list(itertools.product(range(len(RESPONSES)), repeat=sampled)), dtype=torch.long)
    fixed_GF = torch.tensor(offline, dtype=torch.long).expand(len(drawn_GN), len(offline))
    groups_GK = torch.cat([fixed_GF, drawn_GN], 1)
    k = groups_GK.shape[1]
    rewards = rewards_Q[groups_GK].flatten().float()
    if normalize == "split":
        split["given"] = (torch.arange(k) < len(offline)).repeat(len(drawn_GN))
    advantages_GK = group_advantages(rewards, group_size=k, normalize=normalize, **split).view(-1, k).double()
    credit_GK = PROBS_Q[drawn_GN].prod(1)[:, None] * advantages_GK / k
    where_K = (torch.arange(k) >= len(offline)).long() * 2
    slots_GK = (where_K + advantages_GK.lt(0.0)) * len(RESPONSES) + groups_GK
    total = torch.zeros(4 * len(RESPONSES)).double().scatter_add_(0, slots_GK.flatten(), credit_GK.flatten())
    return total.view(2, 2, len(RESPONSES))


def mixed_gradient(rewards_Q, offline, sampled, normalize="std", tau=0.0):
    """The expectation of `mixed_credit`'s groups as a gradient; tau > 0 puts F4's coefficient on every token."""
    return weighted_scores(mixed_credit(rewards_Q, offline, sampled, normalize).sum((0, 1)), rectified(tau))


def rectified(tau):
    """(Q, T): F4's coefficient of each token."""
    return torch.where(TOKEN_PROBS_QT.lt(tau), TOKEN_PROBS_QT, 1.0)


def weighted_scores(credit_Q, coefficients_QT):
    """Sum over responses and tokens of credit, coefficient and score."""
    return torch.einsum("q,qt,qtp->p", credit_Q, coefficients_QT, TOKEN_SCORES_QTP)


def binomial(n, p):
    """(n + 1,): the probability of each number of successes."""
    return f64([math.comb(n, h) * p**h * (1.0 - p) ** (n - h) for h in range(n + 1)])


def closed_scale(k, success):
    """c(K, p) of section 3: what division by the std makes of one prompt's gradient, binary rewards, eps = 0."""
    h = torch.arange(k + 1).double()
    expected = binomial(k, success) @ torch.sqrt(h * (k - h))
    return float(math.sqrt((k - 1) / k) * expected / (k * success * (1.0 - success)))


def closed_mixture(right, wrong, sampled, success, eps=1e-6):
    """Section 5, binary rewards: c_mix, and the expected advantages of a right and of a wrong given response."""
    k, h = right + wrong + sampled, torch.arange(sampled + 1).double()
    share = (h + right) / k
    std = torch.sqrt(k / (k - 1) * share * (1.0 - share)) + eps
    high, low, chance = (1.0 - share) / std, -share / std, binomial(sampled, success)
    slope = h / (sampled * success) * high - (sampled - h) / (sampled * (1.0 - success)) * low
    return tuple(float(chance @ part) for part in (slope, high, low))


def cosine(a_P, b_P):
    return float(torch.dot(a_P, b_P) / (a_P.norm() * b_P.norm()))


def scale(estimate_P, truth_P):
    """How far `estimate` reaches along `truth`: 1 for an unbiased estimator."""
    return float(torch.dot(estimate_P, truth_P) / torch.dot(truth_P, truth_P))
