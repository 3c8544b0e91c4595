"""What the linear loss refuses, with the sentence that says what to do; its module; its rule for chunks."""

from __future__ import annotations

import pytest
import torch
from linear_cases import problem

from gft_kernels import GFTLinearLoss, gft_linear_loss
from gft_kernels.linear import chunks


@pytest.mark.parametrize(
    ("rows", "vocabulary", "bytes_per_logit", "device", "expected"),
    [
        (512, 151936, 4, "cpu", 512),  # 311 MB: all at once
        (8192, 151936, 4, "cpu", 820),  # 883 fit: ten equal chunks
        (8192, 151936, 4, "cuda", 2816),  # 3533 fit: three chunks of 2731, in whole tiles of 256
        (8192, 262144, 4, "cuda", 2048),  # as many fit
        (8192, 300000, 4, "cuda", 2048),  # 1789 would fit, but the floor holds
        (8192, 128256, 4, "cuda", 4096),  # 4186 fit: two chunks
        (5000, 32000, 2, "cuda", 5000),
        (0, 32000, 2, "cuda", 1),
        (7, 0, 4, "cpu", 7),  # an empty shard
    ],
)
def test_the_rule_for_chunks(rows, vocabulary, bytes_per_logit, device, expected):
    assert chunks.chunk_rows(rows, vocabulary, bytes_per_logit, device) == expected


class _Adapter(torch.nn.Module):
    """What peft puts in a linear layer's place."""

    def __init__(self):
        super().__init__()
        self.base_layer = torch.nn.Linear(4, 9)


def _zero3():
    weight = torch.nn.Parameter(torch.empty(0))
    weight.ds_id = 3
    return weight


class _Packed(torch.Tensor):
    """A tensor subclass that stores something else than its numbers."""

    def __tensor_flatten__(self):
        raise NotImplementedError


REFUSED = {
    "adapter": (lambda: {"weight": _Adapter()}, TypeError, "adapter layer _Adapter; merge the adapter"),
    "module": (lambda: {"weight": torch.nn.Linear(4, 9)}, TypeError, "pass its .weight"),
    "no tensor": (lambda: {"weight": [1.0]}, TypeError, "pass lm_head.weight"),
    "zero-3": (lambda: {"weight": _zero3()}, ValueError, "ZeRO-3 parameter of 0 elements; call this inside"),
    "quantised": (lambda: {"weight": torch.zeros(9, 4, dtype=torch.int8)}, TypeError, "keep it unquantised"),
    "packed": (lambda: {"weight": torch.zeros(9, 4).as_subclass(_Packed)}, TypeError, "packs its numbers"),
    "transposed": (lambda: {"weight": torch.zeros(4, 9)}, ValueError, "not its transpose"),
    "one-dimensional": (lambda: {"weight": torch.zeros(9)}, ValueError, r"shape \(V, D\)"),
    "empty": (lambda: {"weight": torch.zeros(0, 4)}, ValueError, "gather it first"),
    "bias": (lambda: {"bias": torch.zeros(4)}, ValueError, r"bias must have shape \(9,\)"),
    "dtypes": (lambda: {"hidden": torch.zeros(3, 4, dtype=torch.bfloat16)}, TypeError, "call under torch.autocast"),
    "double": (lambda: {"hidden": torch.zeros(3, 4, dtype=torch.float64)}, TypeError, "hidden must be float32"),
    "hidden": (lambda: {"hidden": torch.zeros(4)}, ValueError, r"\(S, T, D\) or \(R, D\)"),
    "targets": (lambda: {"targets": torch.tensor([1, 9, 2])}, ValueError, "got 9 at row 1"),
    "chunk_rows": (lambda: {"chunk_rows": 0}, ValueError, "whole number of at least 1, got 0"),
    "filter_eps": (lambda: {"filter_eps": 1e-7}, ValueError, r"filter_eps must be None, .* \[1e-6, 1\), got 1e-07"),
    "filter word": (lambda: {"filter_eps": "all"}, ValueError, "filter_eps must be None, .* got 'all'; None leaves"),
    "accum_dtype": (lambda: {"accum_dtype": torch.bfloat16}, ValueError, "accum_dtype must be torch.float32"),
    "logits_dtype": (lambda: {"logits_dtype": torch.float16}, ValueError, "logits_dtype must be torch.float32"),
    "temperature": (lambda: {"temperature": 0.0}, ValueError, "temperature must be finite and positive"),
    "logit_scale": (lambda: {"logit_scale": 0.0}, ValueError, "logit_scale must be finite and not 0"),
    "backend": (lambda: {"backend": "fast"}, ValueError, "backend must be one of"),
    "inplace": (lambda: {"inplace": True}, TypeError, "inplace"),
    "process_group": (
        lambda: {"process_group": 3},
        TypeError,
        "process_group must be a torch.distributed.ProcessGroup",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_what_to_do(name):
    wrong, error, sentence = REFUSED[name]
    given = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(9, 4), "targets": torch.tensor([1, 2, 3]), **wrong()}
    with pytest.raises(error, match=sentence):
        gft_linear_loss(**given)


def test_a_dtensor_is_refused():
    weight = torch.zeros(9, 4)
    weight.full_tensor, weight.placements = lambda: weight, ()
    with pytest.raises(TypeError, match=r"weight.full_tensor\(\)"):
        gft_linear_loss(torch.zeros(3, 4), weight, torch.tensor([1, 2, 3]))


def test_the_module_is_the_function():
    case = problem()
    module = GFTLinearLoss(tau=0.4, group_size=2, chunk_rows=5)
    loss = module(case.hidden, case.weight, case.targets, rewards=case.rewards)
    assert loss == gft_linear_loss(
        case.hidden, case.weight, case.targets, rewards=case.rewards, group_size=2, tau=0.4, chunk_rows=5
    )
    assert "tau=0.4" in repr(module)
    with pytest.raises(TypeError, match="inplace must be an option of gft_linear_loss"):
        GFTLinearLoss(inplace=True)
