"""The Triton kernels without a GPU: their own tests and what autograd asks of them, interpreted."""

from __future__ import annotations

import pytest
from interpreter.process import assert_passes, needs_triton

OWN = [f"backends/interpreter/{name}.py" for name in ("formulas_agree", "rows", "shards")]
AUTOGRAD = [
    f"loss/test_autograd.py::test_{name}"
    for name in (
        "a_retained_graph_can_be_walked_again", "in_place_takes_the_logits_storage",
        "out_of_place_leaves_the_logits_alone", "loss_beside_another_loss", "checkpointing",
        "without_gradients_nothing_is_materialised", "what_backward_hands_out_is_the_callers_own",
    )
]  # fmt: skip
"""What a backend decides: whose memory is written, and when. Which derivatives are refused, the operators do."""


@pytest.mark.slow
@needs_triton
def test_under_the_interpreter():
    assert_passes(*OWN, *AUTOGRAD)
