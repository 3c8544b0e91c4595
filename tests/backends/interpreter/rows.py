"""What the public tests cannot reach of the Triton kernels: rows cut at every place, bad indices, many blocks.

Run by tests/backends/test_triton_interpreter.py, with Triton's interpreter for a GPU, in blocks of 512 elements.
"""

from __future__ import annotations

from dataclasses import replace

import oracle
import pytest
import torch
from cases import assert_bad_indices_spoil_their_rows, assert_rounded_over_its_logits, misaligned
from shard_cases import TRANSFORMS, assert_shards_are_parts_of_the_row

from gft_kernels.backends import triton as backend
from gft_kernels.options import FP16_PEAK, Credit, RowCall
from gft_kernels.triton_kernels import row_loss, scale_rows
from gft_kernels.triton_kernels.launch import row_launch

BLOCK = row_launch(1 << 20, torch.float32, "interpreter").block


def assert_right(call, result, upstream=1.0, rtol=1e-5):
    """Per-row losses and gradient against the oracle, for calls with advantages_R and weights_R."""
    credit, logits = call.credit, call.logits_STV
    live = credit.targets_R != credit.ignore_index
    options = {name: getattr(call, name) for name in ("temperature", "logit_scale")}
    losses, truth = oracle.loss_and_gradient(
        logits.reshape(-1, logits.shape[-1]), credit.targets_R, live, credit.advantages_R, credit.weights_R, upstream,
        softcap=call.softcap or None, tau=call.objective.tau, rectify=call.objective.rectify, **options,
    )  # fmt: skip
    torch.testing.assert_close(result.loss.double(), losses.sum(), rtol=rtol, atol=1e-6)
    if result.gradient_STV is not None:
        torch.testing.assert_close(result.gradient_STV.double(), truth.view(logits.shape), rtol=rtol, atol=2e-8)


def row_call(logits, targets, **options):
    rows = len(targets)
    credit = Credit(
        targets, advantages_R=torch.linspace(2.0, -1.5, rows), weights_R=torch.linspace(0.1, 1.0, rows),
        tokens_per_response=logits.shape[1], reduction="sum",
    )  # fmt: skip
    return RowCall(logits, credit, **{"want_gradient": True, **options})


@pytest.mark.parametrize(  # rows of an odd length start at every alignment by themselves
    ("vocabulary", "offset"), [(3, 0), (9, 1), (BLOCK, 0), (BLOCK, 3), (2 * BLOCK + 2, 0), (2 * BLOCK + 2, 1)]
)
def test_a_target_at_every_kind_of_place(vocabulary, offset):
    """Head, foot, tail, and the first and last column of each tile, in rows that start at every alignment."""
    edges = [c + d for c in range(0, vocabulary + 5, BLOCK) for d in (-4, -3, -1, 0, 1, 3, 4)]
    targets = torch.tensor(sorted({c for c in [*edges, vocabulary - 1] if 0 <= c < vocabulary}))
    logits = misaligned(len(targets), vocabulary, offset, vocabulary)
    call = row_call(logits, targets)
    assert_right(call, backend.run(call))


@pytest.mark.parametrize(("row_stride", "inplace"), [(1131, False), (1131, True), (1132, True), (1136, False)])
def test_rows_further_apart_than_they_are_long(row_stride, inplace):
    """The gradient's rows lie at other alignments than the logits'; what lies between the rows stays as it is."""
    logits = misaligned(4, 1131, 1, row_stride)
    before = logits.clone()
    call = row_call(logits, torch.tensor([0, 1130, 512, 2]), inplace=inplace)
    result = backend.run(call)
    assert (result.gradient_STV.data_ptr() == logits.data_ptr()) == inplace
    assert_right(replace(call, logits_STV=before), result)
    between = logits.as_strided((4, row_stride - 1131), (row_stride, 1), logits.storage_offset() + 1131)
    assert between.isnan().all()


@pytest.mark.parametrize(
    ("vocabulary", "offset", "row_stride"), [(3, 0, 3), (9, 1, 9), (BLOCK, 0, BLOCK), (1131, 0, 1136), (2051, 3, 2052)]
)
def test_a_gradient_rounded_as_it_is_written(vocabulary, offset, row_stride):
    assert_rounded_over_its_logits(backend, torch.float16, vocabulary, offset, row_stride)


def test_in_place_and_out_of_place_give_the_same_bits():
    logits = misaligned(5, 1031, 2, 1032)
    call = row_call(logits, torch.tensor([0, 1030, 300, 2, 512]))
    apart = backend.run(call)
    together = backend.run(replace(call, inplace=True))
    assert torch.equal(apart.gradient_STV, together.gradient_STV) and torch.equal(apart.loss, together.loss)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_row_that_does_not_count_is_cleared_to_its_last_element(inplace):
    logits = misaligned(3, 3 * BLOCK + 7, 1, 3 * BLOCK + 9)
    logits[0, 1] = float("nan")
    call = row_call(logits, torch.tensor([0, -100, 700]), inplace=inplace)
    result = backend.run(call)
    assert result.gradient_STV[0, 1].eq(0).all() and result.gradient_STV[0, [0, 2]].ne(0).any(-1).all()


@pytest.mark.parametrize("want_gradient", [False, True])
def test_rows_that_do_not_count_are_not_walked(want_gradient, monkeypatch):
    def walked(*arguments):
        raise AssertionError("a row was read")

    call = row_call(torch.randn(1, 3, 40), torch.tensor([0, -100, 7]), want_gradient=want_gradient)
    monkeypatch.setattr(row_loss, "row_statistics", walked)
    monkeypatch.setattr(row_loss, "map_row", walked)
    backend.run(replace(call, credit=replace(call.credit, advantages_R=torch.zeros(3))))
    with pytest.raises(Exception, match="a row was read"):
        backend.run(call)


def test_an_index_out_of_range_spoils_its_row_only():
    assert_bad_indices_spoil_their_rows(backend.run)


@pytest.mark.parametrize(
    ("options", "transform"),
    zip(({"entropy_coef": 0.0}, {}, {"inplace": True, "gradient_dtype": torch.float16}), TRANSFORMS, strict=True),
)
def test_shards_are_parts_of_the_row(options, transform):
    assert_shards_are_parts_of_the_row(backend, **options, **transform)


def test_float16_rows_are_stored_at_their_peak():
    logits = misaligned(3, 70, 1, 70, torch.float16)
    call = row_call(logits, torch.tensor([0, 69, 33]), defer_scale=True, logit_scale=-1.0, temperature=0.5)
    final = backend.run(replace(call, defer_scale=False, logits_STV=logits.float()))
    result = backend.run(call)
    assert (result.gradient_STV.abs().amax(-1) > FP16_PEAK / 4).all()
    whole = backend.scale(result.gradient_STV.float(), result.row_scale_R, torch.tensor(-2.5), inplace=False)
    torch.testing.assert_close(whole, final.gradient_STV * -2.5, rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize(("inplace", "dtype"), [(False, torch.float32), (True, None), (False, torch.float16)], ids=str)
def test_scaling_by_an_upstream_per_row(inplace, dtype):
    gradient = misaligned(3, 515, 1, 517)
    before, upstream = gradient.clone(), torch.tensor([1.0, -3.0, 0.0])
    out = backend.scale(gradient, None, upstream, inplace, dtype)
    assert torch.equal(out, (before * upstream[None, :, None]).to(dtype or torch.float32))
    assert (out.data_ptr() == gradient.data_ptr()) == inplace


def test_a_backward_in_place_with_upstream_1_does_not_touch_the_gradient(monkeypatch):
    def touched(*arguments):
        raise AssertionError("the row was read")

    gradient = torch.randn(1, 2, 40)
    monkeypatch.setattr(scale_rows, "map_row", touched)
    backend.scale(gradient, None, torch.tensor(1.0), inplace=True)
    with pytest.raises(Exception, match="the row was read"):
        backend.scale(gradient, None, torch.tensor(1.0), inplace=False)


def test_refusals_are_sentences():
    call = row_call(torch.randn(1, 4, 6).transpose(1, 2), torch.zeros(6, dtype=torch.int64))
    assert "stride 1 along the vocabulary, got 6" in backend.refuses(call)
    meta = replace(call, logits_STV=torch.empty(1, 6, 4, device="meta"))
    assert backend.refuses(meta) == "logits must be on the CPU under TRITON_INTERPRET=1, got meta"
    assert backend.refuses(replace(call, logits_STV=torch.randn(1, 6, 4))) is None
