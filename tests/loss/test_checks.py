"""Bad input: one clear sentence each, naming argument, condition, value and remedy."""

from __future__ import annotations

import itertools
import math
import operator
import weakref

import pytest
import torch

from gft_kernels import BackendUnavailable, _extension, gft_loss, group_advantages
from gft_kernels.layout import shares_memory

LOGITS, TARGETS = torch.randn(4, 3, 7), torch.zeros(4, 3, dtype=torch.long)
PACKED, PACKED_TARGETS = LOGITS.view(12, 7), TARGETS.view(12)
REWARDS = torch.rand(4)

BAD = {
    "logits type": (dict(logits=[1.0]), TypeError, "logits must be a torch.Tensor, got list"),
    "logits shape": (dict(logits=torch.randn(7)), ValueError, r"logits must have shape .*got \(7,\)"),
    "logits dtype": (
        dict(logits=LOGITS.double()),
        TypeError,
        "logits must be float32, bfloat16 or float16, got torch.float64",
    ),
    "empty vocabulary": (dict(logits=torch.randn(4, 3, 0)), ValueError, "logits must have a vocabulary of at least 1"),
    "targets shape": (dict(targets=TARGETS[:, :2]), ValueError, r"targets must have shape \(4, 3\), got \(4, 2\)"),
    "targets dtype": (dict(targets=TARGETS.float()), TypeError, "targets must be int64 or int32, got torch.float32"),
    "target too large": (
        dict(targets=TARGETS.clone().fill_(7)),
        ValueError,
        r"targets must lie in \[0, 7\), got 7 at row 0",
    ),
    "target negative": (
        dict(targets=torch.tensor([[0, 1, 2], [3, -5, 0], [0, 0, 0], [0, 0, 0]])),
        ValueError,
        r"targets must lie in \[0, 7\), got -5 at row 4; .*ignore_index=-100",
    ),
    "mask dtype": (dict(mask=torch.ones(4, 3)), TypeError, "mask must be bool, got torch.float32"),
    "mask shape": (dict(mask=torch.ones(4, dtype=torch.bool)), ValueError, r"mask must have shape \(4, 3\)"),
    "both": (
        dict(rewards=REWARDS, advantages=REWARDS, group_size=2),
        ValueError,
        "rewards and advantages must not both be given",
    ),
    "no groups": (
        dict(rewards=REWARDS),
        ValueError,
        "group_size or group_ids must be given with rewards, .*got neither",
    ),
    "two groupings": (
        dict(rewards=REWARDS, group_size=2, group_ids=torch.zeros(4, dtype=torch.long)),
        ValueError,
        "exactly one of them, got both",
    ),
    "group size": (
        dict(rewards=REWARDS, group_size=3),
        ValueError,
        "group_size must divide the number of responses, got 3 for 4",
    ),
    "group size 0": (
        dict(rewards=REWARDS, group_size=0),
        ValueError,
        "group_size must be a whole number of at least 1, got 0",
    ),
    "group ids": (
        dict(rewards=REWARDS, group_ids=torch.zeros(3, dtype=torch.long)),
        ValueError,
        r"group_ids must have shape \(4,\), got \(3,\)",
    ),
    "rewards shape": (
        dict(rewards=torch.rand(3), group_size=3),
        ValueError,
        r"rewards must have shape \(4,\), got \(3,\)",
    ),
    "rewards NaN": (
        dict(rewards=torch.tensor([1.0, float("nan"), 0, 0]), group_size=2),
        ValueError,
        "rewards must be finite, got nan at position 1",
    ),
    "advantages shape": (
        dict(advantages=torch.rand(5)),
        ValueError,
        r"advantages must have shape \(4, 3\) or \(4,\), got \(5,\)",
    ),
    "group_size unused": (dict(group_size=2), ValueError, "group_size must be left out without rewards, got 2"),
    "normalize unused": (
        dict(advantages=REWARDS, normalize="mean"),
        ValueError,
        "normalize must be left out without rewards",
    ),
    "tau low": (dict(tau=-0.1), ValueError, r"tau must lie in \[0, 1\], got -0.1"),
    "tau high": (dict(tau=1.5), ValueError, r"tau must lie in \[0, 1\], got 1.5"),
    "tau NaN": (dict(tau=float("nan")), ValueError, r"tau must lie in \[0, 1\], got nan"),
    "rectify": (dict(rectify="some"), ValueError, "rectify must be one of all, positive, bounded, given, got 'some'"),
    "temperature": (dict(temperature=0.0), ValueError, "temperature must be finite and positive, got 0.0"),
    "softcap": (dict(softcap=-1.0), ValueError, "softcap must be finite and positive, got -1.0"),
    "reduction": (
        dict(reduction="mean"),
        ValueError,
        "reduction must be one of token-mean, sequence-mean, sum, none, got 'mean'",
    ),
    "normalize": (
        dict(rewards=REWARDS, group_size=2, normalize="z"),
        ValueError,
        "normalize must be one of std, mean, leave-one-out",
    ),
    "singleton": (
        dict(rewards=REWARDS, group_size=1, singleton="one"),
        ValueError,
        "singleton must be one of reward, zero",
    ),
    "eps": (dict(rewards=REWARDS, group_size=2, eps=-1.0), ValueError, "eps must be finite and not negative, got -1.0"),
    "items with sum": (
        dict(reduction="sum", num_items_in_batch=4),
        ValueError,
        "num_items_in_batch must be None with reduction='sum'",
    ),
    "items 0": (dict(num_items_in_batch=0), ValueError, "num_items_in_batch must be finite and positive, got 0"),
    "items shape": (
        dict(num_items_in_batch=torch.ones(2)),
        ValueError,
        r"num_items_in_batch must hold one number, got shape \(2,\)",
    ),
    "backend": (
        dict(backend="gpu"),
        ValueError,
        "backend must be one of auto, reference, cpu, triton, cuda, got 'gpu'",
    ),
    "sequence ids, padded": (dict(sequence_ids=TARGETS), ValueError, "sequence_ids must be left out for padded rows"),
    "packed rewards": (
        dict(logits=PACKED, targets=PACKED_TARGETS, rewards=REWARDS, group_size=2),
        ValueError,
        "sequence_ids must be given for packed rows with rewards",
    ),
    "packed sequence-mean": (
        dict(logits=PACKED, targets=PACKED_TARGETS, reduction="sequence-mean"),
        ValueError,
        "sequence_ids must be given for packed rows with reduction='sequence-mean'",
    ),
    "packed advantages": (
        dict(logits=PACKED, targets=PACKED_TARGETS, advantages=REWARDS),
        ValueError,
        r"advantages must have shape \(12,\), got \(4,\); or pass sequence_ids",
    ),
    "sequence id range": (
        dict(logits=PACKED, targets=PACKED_TARGETS, rewards=REWARDS, group_size=2, sequence_ids=torch.arange(12) // 2),
        ValueError,
        r"sequence_ids must lie in \[0, 4\), got 4 at row 8",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_name_themselves(name):
    arguments, error, message = BAD[name]
    with pytest.raises(error, match=message) as caught:
        gft_loss(**{"logits": LOGITS, "targets": TARGETS, **arguments})
    text = str(caught.value)
    assert "\n" not in text and "; " in text, "one sentence that ends in a remedy"


def test_a_masked_row_may_hold_any_target():
    targets = TARGETS.clone()
    targets[1, 1] = 10**9
    gft_loss(LOGITS, targets, mask=targets == 0)


def test_inplace_refuses_parameters_and_shared_rows():
    leaf = torch.randn(4, 3, 7, requires_grad=True)
    buffer = torch.randn(84).view(4, 3, 7).requires_grad_()  # a leaf, and a view of what is none
    for logits in (leaf, leaf[1:], leaf.transpose(0, 1).transpose(0, 1), buffer):
        with pytest.raises(ValueError, match=r"inplace must be False for logits that are .a view of. a leaf"):
            gft_loss(logits, TARGETS[: len(logits)], inplace=True)
    assert leaf.isfinite().all()


@pytest.mark.parametrize("passed", ["leaf", "view"])
def test_inplace_refuses_parameters_under_a_compiler(passed):
    torch._dynamo.reset()
    leaf = torch.randn(4, 3, 7, requires_grad=True)
    before, logits = leaf.detach().clone(), leaf if passed == "leaf" else leaf.view(12, 7)
    compiled = torch.compile(lambda x: gft_loss(x.view(12, 7), PACKED_TARGETS, inplace=True), backend="eager")
    with pytest.raises(ValueError, match=r"inplace must be False for logits that are .a view of. a leaf"):
        compiled(logits)
    assert torch.equal(leaf.detach(), before)


LAYOUTS = {
    "expanded": ((4, 3, 7), (0, 7, 1), True),
    "unfold": ((5, 2, 7), (7, 7, 1), True),  # rows 1 to 2 of a response are rows 0 to 1 of the next
    "half a row on": ((4, 3, 6), (18, 3, 1), True),
    "one element": ((1, 3, 7), (21, 6, 1), True),
    "sliding": ((1, 4, 5), (1, 1, 1), True),
    "plain": ((4, 3, 7), (21, 7, 1), False),
    "transposed": ((4, 3, 7), (7, 28, 1), False),
    "vocabulary first": ((4, 3, 7), (3, 1, 12), False),
    "every other": ((2, 3, 7), (84, 14, 2), False),
    "interleaved": ((1, 2, 3), (6, 3, 2), False),  # 0 2 4 and 3 5 7: no stride spans what lies below it
    "interleaved, met": ((1, 2, 4), (8, 3, 2), False),  # 0 2 4 6 and 3 5 7 9
    "interleaved, three": ((2, 3, 3), (20, 4, 3), False),
    "met in three": ((3, 3, 3), (7, 4, 3), True),  # 4 + 3 = 7
    "one column": ((4, 3, 1), (3, 1, 5), False),
    "empty, transposed": ((0, 3, 7), (1, 0, 0), False),
    "one of each": ((1, 1, 1), (0, 0, 0), False),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_in_place_refuses_every_layout_whose_elements_share_memory(name):
    shape, strides, shares = LAYOUTS[name]
    addresses = [sum(i * s for i, s in zip(at, strides, strict=True)) for at in itertools.product(*map(range, shape))]
    assert shares == (len(set(addresses)) < len(addresses)), "the table itself"
    assert shares_memory(shape, strides) == shares
    logits = torch.randn(200, requires_grad=True).exp().as_strided(shape, strides)
    targets = torch.zeros(shape[:2], dtype=torch.long)
    if shares:
        with pytest.raises(ValueError, match=r"inplace must be False for logits whose elements share memory"):
            gft_loss(logits, targets, inplace=True)
    else:
        before = logits.detach().clone()
        loss = gft_loss(logits, targets, inplace=True, reduction="sum")
        torch.testing.assert_close(loss.detach(), gft_loss(before, targets, reduction="sum"))


def test_sharing_is_decided_exactly():
    """Every layout of three small dimensions, against its addresses."""
    sizes, strides = range(1, 4), range(0, 8)
    for shape in itertools.product(sizes, repeat=3):
        for steps in itertools.product(strides, repeat=3):
            addresses = {sum(map(operator.mul, at, steps)) for at in itertools.product(*map(range, shape))}
            assert shares_memory(shape, steps) == (len(addresses) < math.prod(shape)), (shape, steps)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_backend_named_but_unable_says_why(name):
    with pytest.raises(BackendUnavailable, match=f"got '{name}': .+; try backend='auto'"):
        gft_loss(LOGITS, TARGETS, backend=name)


def test_group_advantages_checks_its_arguments():
    with pytest.raises(TypeError, match=r"rewards must be a torch.Tensor, got list"):
        group_advantages([1.0], group_size=1)
    with pytest.raises(ValueError, match=r"rewards must have shape \(S,\), got \(2, 2\)"):
        group_advantages(torch.ones(2, 2), group_size=1)
    with pytest.raises(ValueError, match="rewards must be finite, got inf at position 1"):
        group_advantages(torch.tensor([1.0, float("inf")]), group_size=2)
    with pytest.raises(ValueError, match="got neither"):
        group_advantages(torch.ones(2))
    with pytest.raises(ValueError, match=r"given must be left out with normalize 'std', got a tensor of shape .*; it"):
        group_advantages(torch.ones(2), group_size=2, given=torch.ones(2, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"given must be a torch.Tensor, got NoneType; pass one bool per response"):
        group_advantages(torch.ones(2), group_size=2, normalize="split")
    with pytest.raises(ValueError, match="normalize must be one of std, mean, leave-one-out, got 'split'"):
        gft_loss(LOGITS, TARGETS, rewards=torch.ones(len(LOGITS)), group_size=1, normalize="split")


def test_what_is_remembered_of_options_is_of_their_values_and_kinds():
    """True is no 1.0, which it equals; a tensor of one number may hold another the next time, and is not kept."""
    logits, targets = torch.randn(2, 7), torch.tensor([1, 2])
    for option in ("temperature", "tau"):
        gft_loss(logits, targets, **{option: 1.0})
        with pytest.raises(TypeError, match=f"{option} must"):
            gft_loss(logits, targets, **{option: True})
    tau = torch.tensor(0.0)
    sft = gft_loss(logits, targets, tau=tau)
    assert sft != gft_loss(logits, targets, tau=tau.fill_(1.0)) == gft_loss(logits, targets, tau=1)
    kept = weakref.ref(tau)
    del tau
    assert kept() is None


@pytest.mark.parametrize("built", [True, False], ids=["C++", "torch"])
def test_numbers_are_looked_at_by_the_kernels_or_by_torch(built, monkeypatch):
    """The last of a hundred, and both ends: those of rows that do not count are nobody's business."""
    if not built:
        monkeypatch.setattr(_extension, "absent", lambda: "not built")
    logits, advantages, mask = torch.randn(101, 7), torch.ones(101), torch.ones(101, dtype=torch.bool)
    for wrong in (-1, 7, 2**40):
        targets = torch.full((101,), 6)
        targets[100] = wrong
        with pytest.raises(ValueError, match=rf"targets must lie in \[0, 7\), got {wrong} at row 100"):
            gft_loss(logits, targets, mask=mask, backend="reference")
        assert gft_loss(logits, targets, mask=mask.index_fill(0, torch.tensor([100]), False)).isfinite()
    targets, largest = torch.full((101,), 6), torch.finfo(torch.float32).max
    for wrong in (math.nan, math.inf, -math.inf):
        advantages[100] = wrong
        with pytest.raises(ValueError, match=rf"advantages must be finite, got {wrong} at position 100"):
            gft_loss(logits, targets, advantages=advantages, backend="reference")
    gft_loss(logits, targets, advantages=advantages.index_fill(0, torch.tensor([100]), largest), backend="reference")
    assert gft_loss(logits[:0], targets[:0], backend="reference") == 0.0
