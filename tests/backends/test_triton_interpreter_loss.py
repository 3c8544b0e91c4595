"""The Triton kernels without a GPU: `gft_loss` over them, interpreted."""

from __future__ import annotations

import pytest
from interpreter.process import LEFT_OUT, assert_passes, needs_triton

SLOW = "not (float16 and (tau or softcap or per_row or poison or strides or statistics or peaked)) and not 10000000000"
SHARED = "not (means_and or advantages_given or shuffling or ragged and not reward-std)"
"""Who gets what is advantages.py's text for every backend but the native ones: one case shows that it arrives."""


@pytest.mark.slow
@needs_triton
def test_the_loss_under_the_interpreter():
    assert_passes("loss/test_loss.py", names=" and ".join([SLOW, SHARED, *(f"not {name}" for name in LEFT_OUT)]))
