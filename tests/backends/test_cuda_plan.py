"""How the CUDA kernels cut a row up and choose a launch (csrc/cuda/plan.h), exhaustively, on the host."""

from __future__ import annotations

import cuda_on_host
import pytest
import torch
from cuda_on_host import Machine, library

from tests.codegen import budget

pytestmark = pytest.mark.skipif(cuda_on_host.absent() is not None, reason=str(cuda_on_host.absent()))

H100 = Machine(132, 233472, 232448, 1024, 16)
A100 = Machine(108, 167936, 166912, 1024, 1)
RTX_5090 = Machine(170, 102400, 101376, 1024, 16)
B200 = Machine(148, 233472, 232448, 1024, 16)


@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("blocks", [1, 2, 4, 8, 16])
def test_every_element_has_one_owner(element_bytes, blocks):
    for vocabulary in [*range(1, 150), 1003, 4099]:
        for past in range(0, 16, element_bytes):
            owners = torch.zeros(vocabulary, dtype=torch.int32)
            library().count_owners(1 << 20 | past, vocabulary, element_bytes, blocks, 64, owners.data_ptr())
            assert owners.eq(1).all(), f"V {vocabulary}, {past} bytes past a boundary: {owners.tolist()}"


def plan(machine, rows, vocabulary, element_bytes, choice=0):
    return library().plan_cluster(machine, rows, vocabulary, element_bytes, choice)


@pytest.mark.parametrize(
    ("vocabulary", "element_bytes", "blocks"),
    [(32000, 2, 1), (32000, 4, 2), (50257, 2, 1), (128256, 2, 4), (151936, 2, 4), (151936, 4, 8), (262144, 2, 8),
     (262144, 4, 16)],
)  # fmt: skip
def test_two_blocks_share_a_multiprocessor_of_an_h100(vocabulary, element_bytes, blocks):
    chosen = plan(H100, 8192, vocabulary, element_bytes)
    assert chosen.blocks == blocks
    assert chosen.capacity * blocks * 16 >= vocabulary // (16 // element_bytes) * 16
    assert 2 * (chosen.shared_bytes + 1024) <= 233472
    if blocks > 1:  # the next smaller cluster would not fit twice
        assert 2 * (vocabulary * element_bytes // (blocks // 2) + 1024) > 233472


@pytest.mark.parametrize("machine", [H100, B200], ids=["H100 and H200", "B200"])
@pytest.mark.parametrize(
    ("vocabulary", "element_bytes", "plan_of_it"),
    [(32000, 2, (1, 512, 4000)), (50257, 2, (1, 512, 6288)), (128256, 2, (4, 512, 4008)), (151936, 2, (4, 512, 4752)),
     (151936, 4, (8, 512, 4752)), (262144, 2, (8, 512, 4096)), (262144, 4, (16, 512, 4096)), (4099, 4, (1, 128, 1024))],
)  # fmt: skip
def test_the_plan_of_a_large_batch(machine, vocabulary, element_bytes, plan_of_it):
    """Blocks a row, threads, vectors a block, and the shared memory they take; an H200 is an H100 to the plan."""
    chosen = plan(machine, 8192, vocabulary, element_bytes)
    assert (chosen.blocks, chosen.threads, chosen.capacity) == plan_of_it
    assert chosen.shared_bytes == library().header_bytes() + 16 * chosen.capacity
    assert library().header_bytes() <= 1024


def test_without_room_for_two_the_next_choices_hold_one_block_a_multiprocessor():
    choices = [plan(H100, 8192, 262144, 4, k) for k in range(4)]
    assert [c.blocks for c in choices] == [16, 8, 16, 0]
    assert choices[1].shared_bytes > 233472 // 2
    assert all(c.shared_bytes <= 232448 for c in choices)


def test_a_row_no_cluster_can_hold_has_no_plan():
    assert plan(H100, 8192, 2_000_000, 4).blocks == 0


def test_before_sm_90_a_cluster_is_one_block():
    assert plan(A100, 8192, 32000, 2).blocks == 1
    assert [plan(A100, 8192, 151936, 2, k).blocks for k in range(2)] == [0, 0]


def test_a_small_multiprocessor_takes_smaller_slices():
    chosen = plan(RTX_5090, 8192, 151936, 2)
    assert chosen.blocks == 8 and 2 * (chosen.shared_bytes + 1024) <= 102400


@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize(("target", "machine"), [("sm_90", H100), ("sm_100", B200), ("sm_120", RTX_5090)])
def test_the_gate_spreads_a_row_over_the_threads_it_gets(target, machine, element_bytes):
    chosen = plan(machine, 8192, budget.VOCABULARY, element_bytes)
    assert chosen.blocks * chosen.threads == budget.KERNELS["cluster_row"].threads_on(target, element_bytes)


@pytest.mark.parametrize(("rows", "blocks"), [(1, 8), (16, 8), (17, 4), (64, 4)])
def test_few_rows_are_spread_over_more_blocks(rows, blocks):
    assert plan(H100, rows, 151936, 2).blocks == blocks


def test_threads_follow_the_slice():
    assert [plan(H100, 10**6, v, 2).threads for v in (8, 4096, 8192, 16384, 32000)] == [64, 64, 128, 256, 512]
