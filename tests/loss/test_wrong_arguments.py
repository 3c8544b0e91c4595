"""Every argument of every public function × every wrong kind of value: one line that names the argument, or it works.

A value that is right for an argument is not wrong there; `RIGHT` lists those.
"""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch

from gft_kernels import (
    GFTLinearLoss,
    GFTLoss,
    gft_linear_loss,
    gft_loss,
    group_advantages,
    policy_loss,
    token_log_probs,
)

TARGETS = torch.zeros(4, 3, dtype=torch.long)
LOGITS, HIDDEN, HEAD = torch.randn(4, 3, 7), torch.randn(4, 3, 5), torch.randn(7, 5)
REWARDS = torch.tensor([1.0, 0.0, 1.0, 1.0])
GROUPS = {"rewards": REWARDS, "group_size": 2}
RATIO = {"objective": "grpo", "old_log_probs": torch.zeros(4, 3)}
PENALTY = {"beta": 0.1, "ref_log_probs": torch.zeros(4, 3)}
WITH_HEAD = {"inputs": HIDDEN, "weight": HEAD}


class Distributed(torch.Tensor):
    """Looks like a DTensor, which needs a process group."""

    placements = ()

    def full_tensor(self):
        return self


class Hostile:
    """Raises, whatever it is asked."""

    def _refuse(self):
        raise OSError("two\nlines")

    __float__ = __index__ = __repr__ = _refuse


def _module(kind, *tensors):
    def call(**given):
        positional = [given.pop(name) for name in tensors]
        return kind(**given)(*positional)

    return call


FUNCTIONS = {
    "gft_loss": (gft_loss, {"logits": LOGITS, "targets": TARGETS}),
    "gft_linear_loss": (gft_linear_loss, {"hidden": HIDDEN, "weight": HEAD, "targets": TARGETS}),
    "policy_loss": (policy_loss, {"inputs": LOGITS, "targets": TARGETS}),
    "token_log_probs": (token_log_probs, {"hidden": HIDDEN, "weight": HEAD, "targets": TARGETS}),
    "group_advantages": (group_advantages, GROUPS),
    "GFTLoss": (_module(GFTLoss, "logits", "targets"), {"logits": LOGITS, "targets": TARGETS}),
    "GFTLinearLoss": (
        _module(GFTLinearLoss, "hidden", "weight", "targets"),
        {"hidden": HIDDEN, "weight": HEAD, "targets": TARGETS},
    ),
}
NEEDS = {  # what must be there for an argument to be looked at as itself
    "group_size": GROUPS, "group_ids": {"rewards": REWARDS}, "rewards": {"group_size": 2}, "normalize": GROUPS,
    "eps": GROUPS, "singleton": GROUPS, "clip_low": RATIO, "clip_high": RATIO, "delta": RATIO, "old_log_probs": RATIO,
    "ref_log_probs": PENALTY, "kl_cap": PENALTY, "kl_estimator": PENALTY,
    "chunk_rows": WITH_HEAD, "accum_dtype": WITH_HEAD, "logits_dtype": WITH_HEAD,
    "bias": WITH_HEAD, "filter_eps": WITH_HEAD, "weight": {"inputs": HIDDEN},
    "beta": {"ref_log_probs": torch.zeros(4, 3)},
    "gamma": {"rectify": "bounded"}, "given": {"rectify": "given"}, "gate_positive": {"objective": "sapo"},
    "gate_negative": {"objective": "sapo"}, "entropy_power": {"objective": "eaft"},
    "given_objective": {"given": torch.ones(4, dtype=torch.bool)},
}  # fmt: skip
OF_SPLIT = {"given": {"normalize": "split"}}  # of group_advantages
OF_SPLIT["imitation"] = {"normalize": "split", "given": torch.tensor([True, False] * 2)}
WRONG = {
    "text": "x", "text with lines": "a\nb", "bytes": b"x", "list": [1, 2], "dict": {}, "object": object(),
    "complex": 1j, "huge": 10**400, "beyond int64": 2**63, "minus beyond": -(2**63) - 1, "inf": math.inf,
    "nan": math.nan, "half": 1.5, "negative": -7.25, "True": True, "None": None, "a function": len,
    "two numbers": torch.tensor([1.0, 2.0]), "complex tensor": torch.ones(4, 3, dtype=torch.complex64),
    "complex scalar": torch.tensor(1j), "bool scalar": torch.tensor(True), "array": np.ones(3),
    "numpy text": np.str_("x"),
    "scalar NaN": torch.tensor(math.nan), "sparse": torch.eye(4, 3).to_sparse(), "csr": torch.eye(4, 3).to_sparse_csr(),
    "nested": torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]), "meta": torch.ones(4, 3, device="meta"),
    "quantised": torch.quantize_per_tensor(torch.ones(4, 3), 0.1, 0, torch.quint8),
    "distributed": torch.ones(4, 3).as_subclass(Distributed), "five dimensions": torch.ones(1, 1, 1, 1, 2),
    "numpy complex": np.complex64(0.5 + 1j), "numpy words": np.array("0.5"), "numpy bytes": np.array(b"1"),
    "numpy flag": np.bool_(True), "numpy object": np.array(1, dtype=object), "hostile": Hostile(),
    "beyond float32": 1e39, "learned": torch.tensor(0.5, requires_grad=True),
    "meta scalar": torch.ones((), device="meta"), "module": torch.nn.Linear(2, 2),
    "dtype": torch.int8, "empty": torch.ones(0),
}  # fmt: skip
if torch.backends.mkldnn.is_available():
    WRONG["mkldnn"] = torch.ones(4, 3).to_mkldnn()
LARGE, ANY_SIGN = ("half", "beyond int64"), ("negative", "minus beyond")  # positive numbers, and others
RIGHT = {  # what an argument takes of WRONG
    "temperature": (*LARGE, "beyond float32"), "softcap": (*LARGE, "beyond float32", "None"),
    "logit_scale": (*LARGE, *ANY_SIGN, "beyond float32", "None"), "entropy_coef": (*LARGE, *ANY_SIGN),
    "rewards": ("two numbers", "empty", "None"), **dict.fromkeys(("eps", "beta", "imitation"), LARGE),
    **dict.fromkeys(("clip_high", "delta", "kl_cap", "num_items_in_batch", "gamma"), (*LARGE, "None")),
    **dict.fromkeys(("gate_positive", "gate_negative", "entropy_power"), (*LARGE, "None")),
    **dict.fromkeys(("return_stats", "return_entropy", "inplace"), ("True",)),
    **dict.fromkeys(("logits", "inputs", "hidden"), ("meta",)),  # of another shape: others speak
    **dict.fromkeys((
        "advantages", "group_size", "group_ids", "sequence_ids", "mask", "tau", "rectify", "reduction", "bias",
        "chunk_rows", "filter_eps", "accum_dtype", "logits_dtype", "process_group", "old_log_probs", "ref_log_probs",
        "weight", "weights", "given", "given_objective", "kl_estimator", "clip_low"), ("None",)),
}  # fmt: skip
OF_MODULE = {"GFTLoss": gft_loss, "GFTLinearLoss": gft_linear_loss}


def arguments() -> list[tuple[str, str]]:
    return [
        (name, argument)
        for name, (function, _) in FUNCTIONS.items()
        for argument in inspect.signature(OF_MODULE.get(name, function)).parameters
    ]


@pytest.mark.parametrize(("name", "argument"), arguments())
def test_a_wrong_kind_is_one_sentence_that_names_the_argument(name, argument):
    function, given = FUNCTIONS[name]
    needs = {
        k: v
        for k, v in NEEDS.get(argument, {}).items()
        if name == "policy_loss" or k in ("rewards", "group_size", "rectify")
    }
    if name == "group_advantages":
        needs = OF_SPLIT.get(argument, {})
    for kind, value in WRONG.items():
        right = kind in RIGHT.get(argument, ())
        right |= kind == "learned" and name == "token_log_probs" and "half" in RIGHT.get(argument, ())  # no gradient
        call = {**given, **needs, argument: value}
        if argument == "group_ids":
            call.pop("group_size", None)
        try:
            function(**call)
        except (ValueError, TypeError) as error:
            text = str(error)
            assert "\n" not in text and len(text) < 400, (kind, text)
            assert text.startswith((f"{argument} ", f"rewards and {argument} ")) or right, (kind, text)
            assert " must " in text and "; " in text, (kind, text)
        else:
            assert right, f"{argument} took {kind}"


@pytest.mark.parametrize("argument", ["advantages", "weights", "old_log_probs", "ref_log_probs"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_live_numbers_must_be_finite(argument, bad):
    """On the CPU, where looking is free; on masked rows anything may stand."""
    values = torch.zeros(4, 3)
    values[2, 1] = bad
    mask = torch.ones(4, 3, dtype=torch.bool)
    call = {"advantages": torch.ones(4, 3), "objective": "grpo", "beta": 0.1, "ref_log_probs": torch.zeros(4, 3)}
    call[argument] = values
    for inputs in ({"inputs": LOGITS}, WITH_HEAD):
        with pytest.raises(ValueError, match=rf"^{argument} must be finite, got .* at position 7; "):
            policy_loss(targets=TARGETS, mask=mask, **inputs, **call)
        mask[2, 1] = False
        policy_loss(targets=TARGETS, mask=mask, **inputs, **call)
        mask[2, 1] = True
    if argument == "advantages":
        with pytest.raises(ValueError, match=r"^advantages must be finite, got .* at position 2; "):
            gft_loss(LOGITS, TARGETS, advantages=torch.tensor([1.0, 0.0, bad, 0.0]))
    if argument == "weights":
        with pytest.raises(ValueError, match=r"^weights must not be negative, got -0.5 at position 7; "):
            gft_loss(LOGITS, TARGETS, weights=torch.where(values == 0, 1.0, -0.5))


@pytest.mark.parametrize("objective", ["gspo", "gmpo"])
@pytest.mark.parametrize("argument", ["advantages", "weights"])
def test_a_row_without_advantage_or_weight_is_part_of_its_responses_ratio(objective, argument):
    """So its log pi_old must be a number, but where the whole response is out."""
    old, factor = torch.zeros(4, 3), torch.ones(4, 3)
    old[2, 1], factor[2, 1] = math.nan, 0.0
    for inputs in ({"inputs": LOGITS}, WITH_HEAD):
        call = {**inputs, "targets": TARGETS, "objective": objective, "old_log_probs": old}
        with pytest.raises(ValueError, match=r"^old_log_probs must be finite, got nan at position 7; "):
            policy_loss(**call, **{argument: factor})
        out = torch.tensor([1.0, 1.0, 0.0, 1.0])
        for whole in (out, out[:, None].expand(4, 3)):
            assert policy_loss(**call, **{argument: whole}).isfinite()


def test_a_fractional_ignore_index_ignores_no_token():
    for wrong in (1.5, 1.0):
        with pytest.raises(TypeError, match=r"^ignore_index must be a whole number of 64 bits, got 1\.[05]; "):
            gft_loss(LOGITS, TARGETS, ignore_index=wrong)
    for right in (-(2**63), 2**63 - 1, np.int32(3), torch.tensor(5)):
        gft_loss(LOGITS, TARGETS, ignore_index=right)


def test_numbers_of_other_makers_are_numbers():
    expected = gft_loss(LOGITS, TARGETS, tau=0.5, num_items_in_batch=3)
    for half, three in ((np.float32(0.5), np.int64(3)), (torch.tensor(0.5), torch.tensor([3])), (0.5, 3.0)):
        assert torch.equal(gft_loss(LOGITS, TARGETS, tau=half, num_items_in_batch=three), expected)


@pytest.mark.parametrize(
    "wrong", [*map(torch.tensor, (0, math.inf, 1e-40)), torch.tensor(1e39, dtype=torch.float64), 1e39, 1e-40]
)
def test_a_denominator_must_be_a_positive_float32(wrong):
    """1e-40 is one, but its inverse is not."""
    with pytest.raises(ValueError, match=r"^num_items_in_batch must (be finite and positive|fit float32), got "):
        gft_loss(LOGITS, TARGETS, num_items_in_batch=wrong)


LEARNED = {"temperature": {}, "softcap": {}, "logit_scale": WITH_HEAD, "tau": {}, "num_items_in_batch": {}, "beta": {}}


@pytest.mark.parametrize("argument", LEARNED)
def test_an_option_is_not_learned(argument):
    """Its gradient would be dropped in silence; where none is asked for, a learned one is a number like another."""
    call = {"inputs": LOGITS, "targets": TARGETS, **LEARNED[argument]}
    if argument == "beta":
        call["ref_log_probs"] = torch.zeros(4, 3)
    learned = torch.nn.Parameter(torch.tensor(0.5))
    with pytest.raises(ValueError, match=rf"^{argument} must be a constant, got a tensor that .*{argument}.detach\(\)"):
        policy_loss(**call, **{argument: learned})
    with torch.no_grad():
        quiet = policy_loss(**call, **{argument: learned})
    assert torch.equal(quiet, policy_loss(**call, **{argument: 0.5}))


@pytest.mark.parametrize("head", [False, True])
def test_meta_tensors_give_shapes(head):
    """What shape inference asks: no numbers, forward and backward."""
    with torch.device("meta"):
        inputs, targets = torch.empty(4, 3, 5, requires_grad=True), torch.empty(4, 3, dtype=torch.long)
        loss = policy_loss(inputs, targets, weight=torch.empty(7, 5) if head else None, reduction="none")
        loss.sum().backward()
    assert loss.shape == (4, 3) and loss.device.type == "meta" and inputs.grad.shape == inputs.shape
