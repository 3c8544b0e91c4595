"""Group advantages (F5) against the oracle, for every grouping Hypothesis can think of."""

from __future__ import annotations

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gft_kernels import group_advantages

groupings = st.lists(
    st.tuples(st.sampled_from([-(10**12), -1, 0, 3, 10**12]), st.sampled_from([0.0, 0.1, 0.3, 1.0, -2.5, 1e6])),
    min_size=1,
    max_size=24,
)


@settings(max_examples=200, deadline=None)
@given(groupings, st.sampled_from(["std", "mean", "leave-one-out"]), st.sampled_from(["reward", "zero"]))
def test_matches_the_oracle_for_any_ids(responses, normalize, singleton):
    ids, rewards = zip(*responses, strict=True)
    rewards = torch.tensor(rewards)
    ours = group_advantages(rewards, group_ids=torch.tensor(ids), normalize=normalize, singleton=singleton)
    truth = oracle.advantages(rewards, ids, normalize, singleton=singleton)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(groupings, st.randoms(use_true_random=False))
def test_does_not_depend_on_the_order_of_responses(responses, random):
    order = list(range(len(responses)))
    random.shuffle(order)
    rewards, ids = torch.tensor([r for _, r in responses]), torch.tensor([g for g, _ in responses])
    straight = group_advantages(rewards, group_ids=ids)[order]
    shuffled = group_advantages(rewards[order], group_ids=ids[order])
    torch.testing.assert_close(straight, shuffled, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e-20, -7e30])
@pytest.mark.parametrize("size", [2, 3, 7, 49])
def test_equal_rewards_give_exactly_zero(reward, size):
    """A float mean need not equal its terms: (0.1 + 0.1 + 0.1) / 3 differs from 0.1, and 1e-17 / 1e-6 is not 0."""
    for dtype in (torch.float32, torch.float64):
        advantages = group_advantages(torch.full((2 * size,), reward, dtype=dtype), group_size=size)
        assert advantages.eq(0).all()


def test_consecutive_groups_are_ids_counted_up():
    rewards = torch.rand(12)
    expected = group_advantages(rewards, group_ids=torch.arange(12) // 4)
    assert torch.equal(group_advantages(rewards, group_size=4), expected)


def test_any_real_dtype_and_no_responses():
    assert torch.equal(group_advantages(torch.tensor([0, 1, 1, 0]), group_size=2),
                       group_advantages(torch.tensor([0.0, 1, 1, 0]), group_size=2))  # fmt: skip
    assert group_advantages(torch.empty(0), group_size=2).shape == (0,)
