"""The linear loss on a CPU as a GPU computes it: halves multiplied as halves, also the logits' gradient, in float32.

The tests are the linear loss's own, whose truth rounds the logits' gradient where the products do.
"""

from __future__ import annotations

import pytest
import test_linear as linear
import test_sparse as sparse
import torch
from backends import cuda_on_host
from cases import DTYPES, HALVES, TAUS

from gft_kernels import backends
from gft_kernels.linear import products


@pytest.fixture(autouse=True)
def halves_multiplied_into_float32(monkeypatch):
    """The product is emulated: what it takes and gives is a GPU's."""
    mm, addmm = torch.mm, torch.addmm

    def wide_mm(a, b, *, out_dtype=None, out=None):
        return mm(a, b, out=out) if out_dtype is None else mm(a.float(), b.float(), out=out)

    def wide_addmm(c, a, b, *, out_dtype=None, out=None):
        return addmm(c, a, b, out=out) if out_dtype is None else addmm(c, a.float(), b.float(), out=out)

    monkeypatch.setattr(products, "multiplies_into_float32", lambda device, dtype: True)
    monkeypatch.setattr(torch, "mm", wide_mm)
    monkeypatch.setattr(torch, "addmm", wide_addmm)


@pytest.fixture(params=["reference", "cuda"])
def rows_of(request, monkeypatch):
    """Row kernels that write a gradient in halves over float32 logits: the readable ones, and CUDA's, on the host."""
    if request.param == "cuda":
        if cuda_on_host.absent():
            pytest.skip(cuda_on_host.absent())
        found, host = backends.named, cuda_on_host.Backend(blocks=2, seed=2)
        monkeypatch.setattr(backends, "named", lambda name: host if name == "cuda" else found(name))
    return request.param


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_sizes_options_and_chunks(rows_of, dtype):
    for hidden_size, vocabulary in ((64, 1000), (2048, 131), (1, 2)):
        linear.test_every_size_and_dtype(rows_of, hidden_size, vocabulary, dtype)
    for tau in TAUS:
        linear.test_tau_and_rectify(rows_of, tau, "positive", dtype)
    for options in ({"softcap": 5.0}, {"softcap": 30.0, "logit_scale": -2.0, "temperature": 0.6}):
        linear.test_transforms_and_bias(rows_of, options, True, dtype)
    for reduction in ("token-mean", "sequence-mean", "sum", "none"):
        linear.test_reductions(rows_of, reduction, dtype)
    linear.test_per_row_losses_take_any_upstream(rows_of, dtype)
    linear.test_the_chunk_size_changes_nothing(rows_of, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_columns_left_out_and_small_weights(monkeypatch, dtype):
    sparse.test_auto_disappears_behind_rounding(dtype, monkeypatch)
    for reduction, items in (("token-mean", None), ("token-mean", 2.0**20), ("none", None)):
        linear.test_flat_rows_of_little_weight(dtype, reduction, items)


def test_sums_and_logits_keep_their_digits():
    linear.test_a_bfloat16_sum_is_offered_and_its_error_grows()
    linear.test_logits_of_size_100_keep_their_digits("reference")


@pytest.mark.parametrize("autocast", HALVES, ids=str)
def test_autocast(autocast):
    for hidden_dtype in DTYPES:
        for weight_dtype in DTYPES:
            linear.test_autocast_multiplies_in_its_dtype_and_keeps_the_gradients_dtypes(
                hidden_dtype, weight_dtype, autocast
            )
