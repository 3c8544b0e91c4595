"""The Triton kernels without a GPU: `policy_loss` over them, interpreted."""

from __future__ import annotations

import pytest
from interpreter.process import assert_passes, needs_triton

POLICY = (  # each of these reads two dozen rows: some for all objectives, the edges for those that have them
    "float32 and (every_objective and penalties or within_bounds and dapo) or edge or overflows or banned"
    " or scaler and 0.5 or own_numbers or given_rows and (luffy or rectified) or row_weights and token-mean"
    " or ratios_of_responses and padded or bad_live and old or lengths and cispo or (masked or without) and dapo"
    " or 200_nats or peaked_rows or negative"
)


@pytest.mark.slow
@needs_triton
def test_the_objectives_under_the_interpreter():
    assert_passes("loss/test_policy.py", names=POLICY)
