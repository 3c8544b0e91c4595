"""What sparse products ask of every entry of a gradient, against float64: in torch and in Triton."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES
from linear_cases import double, here

from gft_kernels.linear.chunks import row_buffer
from gft_kernels.linear.measures import measures_of

pytestmark = pytest.mark.usefixtures("on_device")
SCALES = torch.tensor([1.0, 3e-20, 1e9, 1e-30, 0.0, 1e-4])


def rows_of(rows, vocabulary, dtype, device):
    """Rows of very different sizes, in a buffer as the linear loss's: entries behind the vocabulary are NaN."""
    buffer = row_buffer(rows, vocabulary, dtype, device)
    buffer.as_strided((rows, buffer.stride(0)), buffer.stride()).fill_(torch.nan)
    scales = SCALES if dtype != torch.float16 else SCALES.clamp(1e-3, 100.0) * (SCALES > 0)
    return buffer.copy_(here(torch.randn(rows, vocabulary) ** 3 * scales.repeat(rows)[:rows, None]))


@pytest.mark.parametrize("rows, vocabulary", [(1, 1), (7, 301), (19, 1023), (64, 1024), (6, 2500)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_sizes(backend, dtype, rows, vocabulary, device):
    rows_RV = rows_of(rows, vocabulary, dtype, device)
    top, total, square = measures_of(backend, rows_RV.device).row_sizes(rows_RV)
    exact = double(rows_RV)
    largest = exact.abs().amax(1)
    scaled = exact / largest.clamp_min(1e-300)[:, None]
    assert torch.equal(double(top), largest)
    slack = 2e-6 * scaled.abs().sum(1)
    assert ((double(total) - scaled.sum(1)).abs() <= slack).all()
    assert ((double(square) - scaled.square().sum(1)).abs() <= slack).all()


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize(
    "rows, group, vocabulary", [(1, 1, 1), (7, 3, 301), (19, 64, 1023), (64, 16, 1024), (6, 2, 2500)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_group_sums(backend, dtype, rows, group, vocabulary, squared, device):
    rows_RV = rows_of(rows, vocabulary, dtype, device)
    largest = rows_RV.abs().amax(1).float()
    factor = torch.where(largest > 0, 1.0 / largest, 0.0) * here(torch.rand(rows) - 0.5)
    sums = measures_of(backend, rows_RV.device).group_sums(rows_RV, group, factor, squared)
    terms = double(rows_RV) * double(factor)[:, None]
    if squared:
        terms = terms.square()
    assert sums.shape == (-(-rows // group), vocabulary) and sums.dtype == torch.float32
    for found, part in zip(double(sums), terms.split(group), strict=True):
        assert ((found - part.sum(0)).abs() <= 2e-6 * part.abs().sum(0)).all()


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_is_seen(backend, wrong, device):
    rows_RV = rows_of(3, 301, torch.float32, device)
    rows_RV[1, 77] = wrong
    measures = measures_of(backend, rows_RV.device)
    assert measures.row_sizes(rows_RV)[2].isnan().tolist() == [False, True, False]
    assert measures.group_sums(rows_RV, 1, rows_RV.new_ones(3), squared=True).isfinite().all(1).tolist() == [
        True,
        False,
        True,
    ]
