"""Bad input: one clear sentence each, naming argument, condition, value and remedy."""

from __future__ import annotations

import itertools
import math
import operator
import weakref

import pytest
import torch
from cases import assert_refused

from gft_kernels import BackendUnavailable, _extension, gft_loss, group_advantages
from gft_kernels.layout import shares_memory

LOGITS, TARGETS = torch.randn(4, 3, 7), torch.zeros(4, 3, dtype=torch.long)
PACKED = {"logits": LOGITS.view(12, 7), "targets": TARGETS.view(12)}
REWARDS = torch.rand(4)

BAD = {
    ValueError: [
        (r"logits must have shape .*got \(7,\)", dict(logits=torch.randn(7))),
        ("logits must have a vocabulary of at least 1", dict(logits=torch.randn(4, 3, 0))),
        (r"targets must have shape \(4, 3\), got \(4, 2\)", dict(targets=TARGETS[:, :2])),
        (r"targets must lie in \[0, 7\), got 7 at row 0", dict(targets=TARGETS.clone().fill_(7))),
        (r"targets must lie in \[0, 7\), got -5 at row 4; .*ignore_index=-100",
         dict(targets=torch.tensor([[0, 1, 2], [3, -5, 0], [0, 0, 0], [0, 0, 0]]))),
        (r"mask must have shape \(4, 3\)", dict(mask=torch.ones(4, dtype=torch.bool))),
        ("rewards and advantages must not both be given", dict(rewards=REWARDS, advantages=REWARDS, group_size=2)),
        ("group_size or group_ids must be given with rewards, .*got neither", dict(rewards=REWARDS)),
        ("exactly one of them, got both",
         dict(rewards=REWARDS, group_size=2, group_ids=torch.zeros(4, dtype=torch.long))),
        ("group_size must divide the number of responses, got 3 for 4", dict(rewards=REWARDS, group_size=3)),
        ("group_size must be a whole number of at least 1, got 0", dict(rewards=REWARDS, group_size=0)),
        (r"group_ids must have shape \(4,\), got \(3,\)",
         dict(rewards=REWARDS, group_ids=torch.zeros(3, dtype=torch.long))),
        (r"rewards must have shape \(4,\), got \(3,\)", dict(rewards=torch.rand(3), group_size=3)),
        ("rewards must be finite, got nan at position 1",
         dict(rewards=torch.tensor([1.0, float("nan"), 0, 0]), group_size=2)),
        (r"advantages must have shape \(4, 3\) or \(4,\), got \(5,\)", dict(advantages=torch.rand(5))),
        ("group_size must be left out without rewards, got 2", dict(group_size=2)),
        ("normalize must be left out without rewards", dict(advantages=REWARDS, normalize="mean")),
        (r"tau must lie in \[0, 1\], got -0.1", dict(tau=-0.1)),
        (r"tau must lie in \[0, 1\], got 1.5", dict(tau=1.5)),
        (r"tau must lie in \[0, 1\], got nan", dict(tau=float("nan"))),
        ("rectify must be one of all, positive, bounded, given, got 'some'", dict(rectify="some")),
        ("temperature must be finite and positive, got 0.0", dict(temperature=0.0)),
        ("softcap must be finite and positive, got -1.0", dict(softcap=-1.0)),
        ("reduction must be one of token-mean, sequence-mean, sum, none, got 'mean'", dict(reduction="mean")),
        ("normalize must be one of std, mean, leave-one-out", dict(rewards=REWARDS, group_size=2, normalize="z")),
        ("singleton must be one of reward, zero", dict(rewards=REWARDS, group_size=1, singleton="one")),
        ("eps must be finite and not negative, got -1.0", dict(rewards=REWARDS, group_size=2, eps=-1.0)),
        ("num_items_in_batch must be None with reduction='sum'", dict(reduction="sum", num_items_in_batch=4)),
        ("num_items_in_batch must be finite and positive, got 0", dict(num_items_in_batch=0)),
        (r"num_items_in_batch must hold one number, got shape \(2,\)", dict(num_items_in_batch=torch.ones(2))),
        ("backend must be one of auto, reference, cpu, triton, cuda, got 'gpu'", dict(backend="gpu")),
        ("sequence_ids must be left out for padded rows", dict(sequence_ids=TARGETS)),
        ("sequence_ids must be given for packed rows with rewards", dict(**PACKED, rewards=REWARDS, group_size=2)),
        ("sequence_ids must be given for packed rows with reduction='sequence-mean'",
         dict(**PACKED, reduction="sequence-mean")),
        (r"advantages must have shape \(12,\), got \(4,\); or pass sequence_ids", dict(**PACKED, advantages=REWARDS)),
        (r"sequence_ids must lie in \[0, 4\), got 4 at row 8",
         dict(**PACKED, rewards=REWARDS, group_size=2, sequence_ids=torch.arange(12) // 2)),
        ("weights must be finite, got nan at position 8; give every response id one",
         dict(**PACKED, weights=REWARDS, sequence_ids=torch.arange(12) // 2)),
    ],
    TypeError: [
        ("logits must be a torch.Tensor, got list", dict(logits=[1.0])),
        ("logits must be float32, bfloat16 or float16, got torch.float64", dict(logits=LOGITS.double())),
        ("targets must be int64 or int32, got torch.float32", dict(targets=TARGETS.float())),
        ("mask must be bool, got torch.float32", dict(mask=torch.ones(4, 3))),
    ],
}  # fmt: skip


CASES = [(error, *case) for error, cases in BAD.items() for case in cases]


@pytest.mark.parametrize(("error", "sentence", "given"), CASES, ids=[sentence for _, sentence, _ in CASES])
def test_bad_arguments_name_themselves(error, sentence, given):
    call = {"logits": LOGITS, "targets": TARGETS, **given}
    assert_refused(error, sentence, lambda: gft_loss(**call))


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
    compiled = torch.compile(lambda x: gft_loss(x.view(12, 7), PACKED["targets"], inplace=True), backend="eager")
    with pytest.raises(ValueError, match=r"inplace must be False for logits that are .a view of. a leaf"):
        compiled(logits)
    assert torch.equal(leaf.detach(), before)


def test_in_place_refuses_a_layout_whose_elements_share_memory():
    """Here the rows 1 and 2 of a response are the rows 0 and 1 of the next; a transposed one is written row by row."""
    logits, targets = torch.randn(200, requires_grad=True).exp(), torch.zeros(5, 2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"inplace must be False for logits whose elements share memory"):
        gft_loss(logits.as_strided((5, 2, 7), (7, 7, 1)), targets, inplace=True)
    transposed = logits.as_strided((5, 2, 7), (7, 35, 1))
    expected = gft_loss(transposed.detach().clone(), targets)
    torch.testing.assert_close(gft_loss(transposed, targets, inplace=True).detach(), expected)


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
    two, given = torch.ones(2), torch.ones(2, dtype=torch.bool)
    for error, sentence, call in (
        (ValueError, r"rewards must have shape \(S,\), got \(2, 2\)", dict(rewards=torch.ones(2, 2), group_size=1)),
        (ValueError, "rewards must be finite, got inf at position 1", dict(rewards=torch.tensor([1.0, math.inf]))),
        (ValueError, "got neither", dict(rewards=two, group_size=None)),
        (ValueError, "given must be left out with normalize 'std', got a tensor of shape .*; it", dict(given=given)),
        (TypeError, "given must be a torch.Tensor, got NoneType; pass one bool per resp", dict(normalize="split")),
    ):
        with pytest.raises(error, match=sentence):
            group_advantages(**{"rewards": two, "group_size": 2, **call})
    with pytest.raises(ValueError, match="normalize must be one of std, mean, leave-one-out, got 'split'"):
        gft_loss(LOGITS, TARGETS, rewards=REWARDS, group_size=1, normalize="split")


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
