"""The CUDA backend's adapter on a machine without a GPU: it imports, and says in one sentence why it cannot run."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from gft_kernels import BackendUnavailable, _extension, gft_loss
from gft_kernels.backends import cuda
from gft_kernels.options import Credit, RowCall


def call(logits: torch.Tensor) -> RowCall:
    return RowCall(logits, Credit(torch.zeros(logits.shape[1], dtype=torch.int64)))


def test_a_named_backend_that_cannot_run_says_why():
    if torch.cuda.is_available() and cuda.absent() is None:
        logits = torch.randn(2, 5)
        reason = "on a CUDA GPU, got cpu"
    else:
        logits, reason = torch.randn(2, 5), cuda.absent()
    with pytest.raises(BackendUnavailable, match=re.escape(reason)):
        gft_loss(logits, torch.tensor([1, 2]), backend="cuda")


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ({"absent": lambda: "the C++ kernels are not built"}, "not built"),
        ({"absent": lambda: None, "has_cuda": lambda: False}, "GFT_BUILD=cuda"),
    ],
    ids=["no extension", "no CUDA in it"],
)
def test_what_is_missing_is_named(monkeypatch, missing, sentence):
    for name, answer in missing.items():
        monkeypatch.setattr(_extension, name, answer)
    assert sentence in cuda.absent()


def test_calls_it_cannot_serve():
    assert "CUDA GPU" in cuda.refuses(call(torch.randn(1, 2, 5)))
    assert "logit_scale / temperature must lie within 1e-30 and 1e30" in cuda._beyond_float32(
        replace(call(torch.randn(1, 2, 5)), temperature=1e36)
    )
    strided = torch.empty(1, 5, 2, device="meta").transpose(1, 2)
    assert "meta" in cuda.refuses(call(strided))
