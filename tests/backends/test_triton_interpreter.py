"""The Triton kernels without a GPU: their own tests, interpreted."""

from __future__ import annotations

import pytest
from interpreter.process import assert_passes, needs_triton


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("part", ["formulas_agree", "rows", "shards"])
def test_under_the_interpreter(part):
    assert_passes(f"backends/interpreter/{part}.py")
