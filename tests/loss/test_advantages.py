"""Group advantages (F5) against the oracle, for groupings of every kind."""

from __future__ import annotations

import math
from collections.abc import Iterator
from random import Random

import oracle
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gft_kernels import gft_loss, group_advantages, importance_weights
from gft_kernels.advantages import credit_rows, over_batch_spread
from gft_kernels.options import Credit

IDS, REWARDS = (-(10**12), -1, 0, 3, 10**12), (0.0, 0.1, 0.3, 1.0, -2.5, 1e6)


def drawn(count: int) -> Iterator[tuple[Random, tuple, tuple]]:
    """A source of more, group ids and rewards of up to 24 responses: so often, each time others, always the same."""
    for seed in range(count):
        random = Random(seed)
        size = random.randint(1, 24)
        yield random, tuple(random.choices(IDS, k=size)), tuple(random.choices(REWARDS, k=size))


def assert_advantages(ours, truth, *inputs, atol=1e-9):
    torch.testing.assert_close(ours, truth, rtol=1e-6, atol=atol, msg=lambda message: f"{inputs}: {message}")


@pytest.mark.parametrize("normalize", ["std", "mean", "leave-one-out"])
@pytest.mark.parametrize("singleton", ["reward", "zero"])
def test_matches_the_oracle_for_any_ids(normalize, singleton):
    for _, ids, rewards in drawn(35):
        how = {"normalize": normalize, "singleton": singleton}
        ours = group_advantages(torch.tensor(rewards), group_ids=torch.tensor(ids), **how)
        assert ours.dtype == torch.float32
        assert_advantages(ours.double(), oracle.advantages(torch.tensor(rewards), ids, **how), ids, rewards)


def test_split_weighs_samples_among_themselves_and_what_is_given_against_them():
    for random, ids, rewards in drawn(100):
        kinds, singleton, truth = [random.random() < 0.5 for _ in ids], random.choice(["reward", "zero"]), []
        for s, (group, reward) in enumerate(zip(ids, rewards, strict=True)):
            samples = [k for k, other in enumerate(ids) if other == group and not kinds[k]]
            others = [rewards[k] for k in samples if k != s]
            if kinds[s]:
                truth.append(0.3 * (reward - (sum(others) / len(others) if others else 0.0)))
            else:
                truth.append(reward - sum(others) / len(others) if others else reward * (singleton == "reward"))
        how = {"normalize": "split", "given": torch.tensor(kinds), "imitation": 0.3, "singleton": singleton}
        ours = group_advantages(torch.tensor(rewards, dtype=torch.float64), group_ids=torch.tensor(ids), **how)
        assert_advantages(ours.double(), torch.tensor(truth).double(), ids, rewards, kinds, atol=1e-8)


def test_split_is_exactly_zero_where_samples_are_equal():
    """Whatever is given first, or between them: samples are compared with a sample."""
    for size in range(3, 40):
        given = torch.arange(2 * size) % size == 0
        rewards = torch.full((2 * size,), 0.1, dtype=torch.float64).masked_fill(given, 1.0)
        for groups in ({"group_size": size}, {"group_ids": torch.arange(2 * size) // size}):
            ours = group_advantages(rewards, normalize="split", given=given, **groups)
            assert ours[~given].eq(0.0).all(), size
            assert ours[given].tolist() == pytest.approx([0.9, 0.9])


WAYS = ({}, {"eps": 0.0}, {"normalize": "mean"}, {"normalize": "leave-one-out"})


@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e-20, -7e30, 1e8 + 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_equal_rewards_give_exactly_zero(reward, dtype):
    """A float mean need not equal its terms: (0.1 + 0.1 + 0.1) / 3 differs from 0.1, and 1e-17 / 1e-6 is not 0."""
    if dtype == torch.float16:
        reward = min(max(reward, -6e4), 6e4)
    if dtype == torch.int64:
        reward = int(max(reward, -(2**52)))
    for size in range(2, 65):
        rewards = torch.full((2 * size,), reward, dtype=dtype)
        for groups in ({"group_size": size}, {"group_ids": torch.arange(2 * size) % 2}):
            for how in WAYS if size < 12 else WAYS[:1]:
                assert group_advantages(rewards, **groups, **how).eq(0).all(), (size, groups, how)


@pytest.mark.parametrize("apart", [5e-324, 1e-200, 1e-162, 1e-150])
@pytest.mark.parametrize("eps", [0.0, 1e-300])
def test_rewards_too_close_to_have_a_spread_give_zero(apart, eps):
    """Below 1e-162 the squares of their distances are 0: no distance is divided by that."""
    rewards = torch.tensor([0.0, apart], dtype=torch.float64)
    for groups in ({"group_size": 2}, {"group_ids": torch.zeros(2, dtype=torch.long)}):
        for of in (rewards, rewards.clone().requires_grad_()):  # C++, torch
            ours = group_advantages(of, eps=eps, **groups).detach()
            truth = [-(0.5**0.5), 0.5**0.5] if apart > 1e-162 else [0.0, 0.0]
            torch.testing.assert_close(ours, torch.tensor(truth))


def test_without_numbers_to_look_at_there_is_still_a_result():
    """Traced, fake and batched rewards."""
    rewards = torch.tensor([1.0, 0.0, 1.0, 3.0])
    groups = {"group_size": 2}
    expected = group_advantages(rewards, **groups)
    torch._dynamo.reset()
    compiled = torch.compile(lambda r: group_advantages(r, **groups), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(rewards), expected)
    batched = torch.vmap(lambda r: group_advantages(r, **groups))(torch.stack([rewards, -rewards]))
    torch.testing.assert_close(batched, torch.stack([expected, -expected]))
    with FakeTensorMode():
        assert group_advantages(torch.ones(4), **groups).shape == (4,)
    with torch.device("meta"):  # the default of what is made without one
        learned = group_advantages(rewards.requires_grad_(True), normalize="leave-one-out", **groups)
    torch.testing.assert_close(learned, torch.tensor([1.0, -1.0, -2.0, 2.0]))
    with pytest.raises(ValueError, match="rewards must be finite"):
        group_advantages(torch.nn.Parameter(torch.tensor([1.0, torch.nan])), **groups)


FAR = {  # rewards of one group that float32 cannot tell apart, or cannot hold
    "int64 from 1e8": torch.tensor([0, 1, 2, 3]) + 10**8,
    "int32 from 2e9": torch.tensor([0, 1, 2, 3], dtype=torch.int32) + 2 * 10**9,
    "int64 from 9e15": torch.tensor([0, 1, 1, 3]) + 9 * 10**15,
    "float64 from 1e15": torch.tensor([0.0, 1, 2, 4], dtype=torch.float64) / 8 + 1e15,
    "float64 from 1e9": torch.tensor([0.0, 1, 2, 3], dtype=torch.float64) + 1e9,
    "float64 from 1e9, close": torch.tensor([0.0, 1, 2, 0], dtype=torch.float64) * 1e-6 + 1e9,
    "float64 to 4e39": torch.tensor([1.0, 2, 3, 4], dtype=torch.float64) * 1e39,
    "float64 an outlier first": torch.tensor([1e12, 0.5, 0.25, 0.125], dtype=torch.float64),
    "bool": torch.tensor([True, False, False, True]),
    "uint8": torch.tensor([255, 0, 1, 0], dtype=torch.uint8),
    "float16": torch.tensor([1.0, 2, 3, 5], dtype=torch.float16),
    "bfloat16": torch.tensor([1.0, 2, 3, 5], dtype=torch.bfloat16),
}


@pytest.mark.parametrize("normalize", ["std", "mean", "leave-one-out"])
@pytest.mark.parametrize("name", FAR)
def test_any_real_dtype_in_its_own_digits(name, normalize):
    rewards = FAR[name]
    truth = oracle.advantages(rewards, [0, 0, 0, 0], normalize)
    for groups in ({"group_size": 4}, {"group_ids": torch.zeros(4, dtype=torch.int32)}):
        if name == "float64 to 4e39" and normalize != "std":
            with pytest.raises(ValueError, match=r"rewards must lie within 1e.38 of 0"):
                group_advantages(rewards, normalize=normalize, **groups)
            continue
        ours = group_advantages(rewards, normalize=normalize, **groups)
        torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("normalize", ["std", "mean", "leave-one-out"])
def test_a_loss_sees_rewards_in_their_own_digits(backend, device, normalize):
    logits, targets = torch.randn(4, 2, 7, device=device), torch.tensor([[1, 2]] * 4, device=device)
    options = {"return_stats": True, "normalize": normalize, "backend": backend}
    for rewards in (FAR[name].to(device) for name in FAR if name != "float64 to 4e39"):
        truth = oracle.advantages(rewards, [0, 0, 0, 0], normalize)[:, None].expand(4, 2)
        for groups in ({"group_size": 4}, {"group_ids": torch.zeros(4, dtype=torch.long, device=device)}):
            _, stats = gft_loss(logits, targets, rewards=rewards, **groups, **options)
            torch.testing.assert_close(stats.advantages.cpu().double(), truth, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("rewards", "groups", "limit"),
    [
        ([1e300, -2e300], {"group_size": 2}, "1e.150"),  # their squares are infinite, and A would be 0
        ([2e39, 2e39], {"group_size": 1}, "1e.38"),
        ([2e39, 0.0, 1.0], {"group_ids": torch.tensor([3, 1, 1])}, "1e.38"),
    ],
    ids=str,
)
def test_rewards_whose_advantages_cannot_be_held_are_refused(rewards, groups, limit):
    with pytest.raises(ValueError, match=f"^rewards must lie within {limit} of 0, got .* at position 0; divide"):
        group_advantages(torch.tensor(rewards, dtype=torch.float64), **groups)


@pytest.mark.parametrize(
    ("rewards", "position"),
    [(torch.tensor([0, 1, 2, 3]) + 2**60, 0), (torch.tensor([0, 2**53, 1, 2**53 + 1]), 1),
     (torch.tensor([0, 1, -(2**63), 3]), 2), (torch.tensor([5, 2**60, 0, 1], dtype=torch.uint64), 1)],
    ids=["2^60", "2^53", "least", "uint64"],
)  # fmt: skip
def test_whole_rewards_that_float64_cannot_tell_apart_are_refused(rewards, position):
    """As float64 they would be one number, and their advantages 0."""
    sentence = f"^rewards must be below 2.53 in size where they are whole, got .* at position {position}; subtract"
    for groups in ({"group_size": 4}, {"group_ids": torch.zeros(4, dtype=torch.long)}):
        with pytest.raises(ValueError, match=sentence):
            group_advantages(rewards, **groups)
        with pytest.raises(ValueError, match=sentence):
            gft_loss(torch.randn(4, 2, 7), torch.tensor([[1, 2]] * 4), rewards=rewards, **groups)
    near = torch.tensor([0, 1, 2, 3]) + 2**53 - 4
    torch.testing.assert_close(group_advantages(near, group_size=4), group_advantages(near - near[0], group_size=4))


class Calls(TorchDispatchMode):
    """How many operators torch is asked for."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("reduction", "limit"), [("token-mean", 30), ("sequence-mean", 42)])
def test_consecutive_groups_cost_few_operators(reduction, limit):
    """A loss on rows of any number: a text for ragged groups alone asks for two hundred."""
    credit = Credit(
        torch.zeros(512 * 64, dtype=torch.long), torch.rand(512 * 64) < 0.9, torch.rand(512, dtype=torch.float64),
        group_size=8, tokens_per_response=64, reduction=reduction,
    )  # fmt: skip
    with Calls() as calls:
        credit_rows(credit)
    assert calls.count <= limit
    with Calls() as calls:
        group_advantages(torch.rand(512), group_size=8)
    assert calls.count <= 25


@pytest.mark.parametrize("normalize", ["std", "mean", "leave-one-out"])
@pytest.mark.parametrize("singleton", ["reward", "zero"])
def test_the_native_text_and_torchs_agree(normalize, singleton):
    """Which of the two answers depends on who watches; a gradient can be asked of torch's alone."""
    how = {"normalize": normalize, "singleton": singleton}
    rewards = torch.rand(24, dtype=torch.float64)[::2] * 7 + 1e6
    ids = torch.tensor([5, -2, 5, 5, 9, 5, -2, 1 << 40, -2, 5, 3, 3], dtype=torch.int64)
    for groups in ({"group_ids": ids}, {"group_size": 4}, {"group_size": 1}):
        native = group_advantages(rewards, **groups, **how)
        with Calls() as calls:
            recorded = group_advantages(rewards, **groups, **how)
        assert calls.count > 3, "not asked of torch"
        torch.testing.assert_close(native, recorded, rtol=2e-7, atol=1e-9)
    leaf = rewards.requires_grad_()
    (gradient,) = torch.autograd.grad(group_advantages(leaf, group_size=4, **how).square().sum(), leaf)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_the_deviation_of_a_batch(eps):
    rewards = torch.tensor([1.0, 0.0, 3.0, 2.0], dtype=torch.float64)
    centred = group_advantages(rewards, group_size=2, normalize="mean")
    torch.testing.assert_close(over_batch_spread(centred, rewards, eps), centred / (math.sqrt(5 / 3) + eps))
    assert torch.equal(over_batch_spread(centred, rewards[:1], eps), centred)
    assert over_batch_spread(torch.zeros(4), torch.ones(4), eps).eq(0).all()


def test_no_responses():
    assert group_advantages(torch.empty(0), group_size=2).shape == (0,)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights(level):
    """Against a loop over the responses; what is rejected or does not count weighs 0."""
    generator = torch.Generator().manual_seed(0)
    rollout = -torch.rand(5, 7, generator=generator) * 4
    ours = rollout + torch.randn(5, 7, generator=generator) * 0.1
    mask = torch.rand(5, 7, generator=generator) < 0.8
    ours[~mask] = math.nan
    expected = torch.zeros(5, 7, dtype=torch.float64)
    for s in range(5):
        apart = (ours[s] - rollout[s]).double()
        for t in range(7):
            if mask[s, t]:
                expected[s, t] = math.exp(apart[mask[s]].sum() if level == "sequence" else apart[t])
    options = {"mask": mask, "level": level, "high": 1.2, "low": 0.9}
    outside = (expected < 0.9) | (expected > 1.2)
    assert outside[mask].any() and not outside[mask].all()
    for bound, truth in (
        ("truncate", torch.where(mask, expected.clamp(0.9, 1.2), 0.0)),
        ("mask", torch.where(outside, 0.0, expected)),
    ):
        found = importance_weights(ours, rollout, bound=bound, **options)
        torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=1e-7)
        packed = {**options, "mask": mask.flatten()}
        if level == "sequence":
            packed["sequence_ids"] = torch.arange(35) // 7
        rows = importance_weights(ours.flatten(), rollout.flatten(), bound=bound, **packed)
        torch.testing.assert_close(rows, found.flatten())
    free = importance_weights(ours, rollout, mask=mask, level=level, high=None)
    torch.testing.assert_close(free.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [({"level": "word"}, "level must be one of token, sequence, got 'word'"),
     ({"bound": "clip"}, "bound must be one of truncate, mask, got 'clip'"),
     ({"high": 0.0}, "high must be finite and positive, got 0.0"),
     ({"low": -1.0}, "low must be finite and not negative, got -1.0"),
     ({"low": 3.0}, "low must be at most high, got 3 above 2"),
     ({"mask": torch.ones(3, dtype=torch.bool)}, r"mask must have shape \(4,\), got \(3,\)"),
     ({"level": "sequence"}, "sequence_ids must be a torch.Tensor, got NoneType"),
     ({"sequence_ids": torch.zeros(4, dtype=torch.long)}, "sequence_ids must be left out with level 'token'.*, got .*"),
     ({"level": "sequence", "sequence_ids": torch.zeros(2, 2, dtype=torch.long), "log_probs": torch.zeros(2, 2),
       "rollout_log_probs": torch.zeros(2, 2)}, r"sequence_ids must be left out with .* shape \(2, 2\), got a t.*"),
     ({"log_probs": torch.tensor([[0.0, 0.0], [0.0, math.nan]]), "rollout_log_probs": torch.zeros(2, 2)},
      "log_probs must be finite, got nan at position 3"),
     ({"rollout_log_probs": torch.tensor([0.0, math.inf, 0.0, 0.0])},
      "rollout_log_probs must be finite, got inf at position 1"),
     ({"rollout_log_probs": torch.zeros(3)}, r"rollout_log_probs must have shape \(4,\), got \(3,\)")],
)  # fmt: skip
def test_importance_weights_refuse_what_they_cannot_take(wrong, sentence):
    call = {"log_probs": torch.zeros(4), "rollout_log_probs": torch.zeros(4), **wrong}
    with pytest.raises((TypeError, ValueError), match=rf"^{sentence}; "):
        importance_weights(**call)
