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
@pytest.mark.parametrize("blocks", [1, 2, 5, 7, 8, 16])
def test_every_element_has_one_owner(element_bytes, blocks):
    for vocabulary in [*range(1, 150), 1003, 4099]:
        for past in range(0, 16, element_bytes):
            owners = torch.zeros(vocabulary, dtype=torch.int32)
            library().count_owners(1 << 20 | past, vocabulary, element_bytes, blocks, 64, owners.data_ptr())
            assert owners.eq(1).all(), f"V {vocabulary}, {past} bytes past a boundary: {owners.tolist()}"


def plan(machine, rows, vocabulary, element_bytes, lost=0):
    return library().plan_cluster(machine, rows, vocabulary, element_bytes, lost)


@pytest.mark.parametrize("machine", [H100, B200], ids=["H100 and H200", "B200"])
@pytest.mark.parametrize(
    ("vocabulary", "element_bytes", "plan_of_it"),
    [(32000, 2, (1, 384, 4000)), (32000, 4, (2, 384, 4000)), (50257, 2, (2, 256, 3144)), (128256, 2, (5, 256, 3208)),
     (151936, 2, (6, 256, 3168)), (151936, 4, (11, 256, 3456)), (262144, 2, (7, 384, 4688)),
     (262144, 4, (14, 384, 4688)), (4099, 4, (1, 128, 1024)), (16384, 2, (1, 256, 2048))],
)  # fmt: skip
def test_the_plan_of_a_large_batch(machine, vocabulary, element_bytes, plan_of_it):
    """Blocks a row, threads, vectors a block, and the shared memory they take; an H200 is an H100 to the plan.

    Of a device that holds all clusters it has room for. A real one wastes some, and may prefer another: on an H200
    128256 in bf16 takes 4 blocks, 151936 in fp32 takes 9.
    """
    chosen = plan(machine, 8192, vocabulary, element_bytes)
    assert (chosen.blocks, chosen.threads, chosen.capacity) == plan_of_it
    assert chosen.capacity * chosen.blocks * 16 >= vocabulary // (16 // element_bytes) * 16
    assert chosen.shared_bytes == library().header_bytes() + 16 * chosen.capacity
    together = min(4, 65536 // (56 * chosen.threads))
    assert together >= 3 and together * (chosen.shared_bytes + 1024) <= 233472
    assert library().header_bytes() <= 2048


def test_without_room_for_three_the_most_rows_are_held():
    """700,000 columns in fp32 leave an H100 one block a multiprocessor, in clusters of 13 to 16."""
    chosen = plan(H100, 8192, 700_000, 4)
    assert chosen.together == 1 and chosen.blocks == 13 and chosen.shared_bytes <= 232448


BLOCKS = [  # machine, rows, vocabulary, bytes of an element, a size the device cannot place; blocks a row
    (H100, 8192, 151936, 2, 6, 5), (H100, 1, 151936, 2, 8, 6),  # it is passed over
    (H100, 8192, 2_000_000, 4, 0, 0),  # no cluster can hold it
    (A100, 8192, 32000, 2, 0, 1), (A100, 8192, 151936, 2, 0, 0),  # before sm_90 a cluster is one block
    *((H100, rows, 151936, 2, 0, blocks) for rows, blocks in ((1, 8), (16, 8), (17, 7), (22, 6), (64, 6))),
]  # fmt: skip


@pytest.mark.parametrize("case", BLOCKS, ids=lambda case: str(case[1:]))
def test_blocks_of_a_row(case):
    *asked, blocks = case
    assert plan(*asked).blocks == blocks


def test_a_small_multiprocessor_takes_smaller_slices():
    chosen = plan(RTX_5090, 8192, 151936, 2)
    assert chosen.blocks == 10 and 3 * (chosen.shared_bytes + 1024) <= 102400


@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize(("target", "machine"), [("sm_90", H100), ("sm_100", B200), ("sm_120", RTX_5090)])
def test_the_gate_spreads_a_row_over_the_threads_it_gets(target, machine, element_bytes):
    chosen = plan(machine, 8192, budget.VOCABULARY, element_bytes)
    assert chosen.blocks * chosen.threads == budget.KERNELS["cluster_row"].threads_on(target, element_bytes)


def test_threads_follow_the_slice():
    assert [plan(H100, 10**6, v, 2).threads for v in (8, 4096, 8192, 16384, 32000)] == [64, 64, 128, 256, 384]
    assert plan(H100, 1, 151936, 2).threads == 384, "alone on a multiprocessor"
