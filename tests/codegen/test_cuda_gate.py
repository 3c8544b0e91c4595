"""The offline gate of the CUDA kernels: it must see what it is there to see."""

from __future__ import annotations

import pytest

from tests.codegen import budget, cuda_gate
from tests.codegen.measures import measure_sass
from tests.codegen.sass import loops, read, trip

REPORT = """ptxas info    : Function properties for _ZN3gft4cuda11cluster_rowINS0_4Bf16ELb1EEEvNS0_7RowTaskEi
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 8 bytes cumulative stack size
ptxas info    : Function properties for _ZN3gft4cuda10sum_lossesEPKflPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 1 barriers
"""


def test_the_report_is_read_kernel_by_kernel():
    usages = cuda_gate.usages(REPORT)
    assert {cuda_gate.readable(name): usage for name, usage in usages.items()} == {
        "cluster_row bfloat16 entropy": cuda_gate.Usage(64, 8, 16),
        "sum_losses": cuda_gate.Usage(24, 0, 0),
    }


SCALAR_KERNELS = """
namespace gft::cuda {
__global__ void scale_row(float* x) { x[threadIdx.x] *= 2.0f; }
__global__ void credit_rows(float* x, int lane) {  // an array indexed at run time has to live in local memory
    float values[32];
    for (int j = 0; j < 32; ++j) values[j] = x[j * 32 + threadIdx.x];
    for (int k = 0; k < 64; ++k) values[(lane + k * 7) % 32] += values[(lane * 3 + k) % 32];
    for (int j = 0; j < 32; ++j) x[j * 32 + threadIdx.x] = values[j];
}
}
"""


@pytest.mark.skipif(cuda_gate.absent() is not None, reason=str(cuda_gate.absent()))
def test_a_kernel_that_moves_single_floats_or_uses_local_memory_is_named(tmp_path):
    source = tmp_path / "kernels.cu"
    source.write_text(SCALAR_KERNELS)
    broken = {verdict.variant: verdict.broken for verdict in cuda_gate.judge("sm_90", source)}
    assert any("16-byte loads" in sentence for sentence in broken["sm_90 scale_row"])
    assert any("local memory" in sentence for sentence in broken["sm_90 credit_rows"])
    assert any("stack" in sentence for sentence in broken["sm_90 credit_rows"])


def machine_code(*lines: str) -> str:
    """As nvdisasm writes it; a line that ends in a colon is a label."""
    return "\n".join(f".L_x_{line}" if line.endswith(":") else f"  /*{16 * i:04x}*/  {line} ;"
                     for i, line in enumerate(lines))  # fmt: skip


# Two vectors of four a trip where both are there, a checked path round the second, and a fence outside.
TWO_A_TRIP = ["MEMBAR.ALL.GPU", "1:", "LDS.128 R4, [R2]", *["MUFU.EX2 R4, R4"] * 4, "@P0 BRA `(.L_x_2)",
              "LDS.128 R8, [R2+0x10]", *["MUFU.EX2 R8, R8"] * 4, "2:", "@!P1 MUFU.EX2 R3, R3", "@P1 BRA `(.L_x_1)",
              "EXIT"]  # fmt: skip


def test_the_hot_loop_is_the_shortest_trip_that_does_the_work():
    graph = read(machine_code(*TWO_A_TRIP))
    (loop,) = loops(graph)
    assert graph.count(trip(graph, loop, {r"LDS\.128": 1})) == 8, "round the second vector"
    assert graph.count(trip(graph, loop, {r"LDS\.128": 2, r"MUFU\.EX2": 8})) == 13
    assert trip(graph, loop, {r"LDS\.128": 3}) is None
    hot = budget.unrolled(graph, loop, {r"LDS\.128": 1}, width=4)
    assert (hot.vectors, hot.instructions, hot.mufu) == (2, 6.5, 4), "a predicate that is off costs its issue slot only"
    assert graph.count(loop.body, "MEMBAR") == 0 and graph.count(range(len(graph.blocks)), "MEMBAR") == 1


def test_a_call_to_a_label_is_a_jump_and_one_to_a_function_comes_back():
    graph = read(
        machine_code("@P0 CALL.REL.NOINC `(.L_x_3)", "CALL.REL.NOINC `($slow_path)", "NOP", "EXIT", "3:", "EXIT")
    )
    assert graph.successors == [[3, 1], [2], [], []]


@pytest.mark.parametrize(
    ("row", "broken"), [(4.5, []), (5.0, ["instructions an element must be at most 16.5, got 17.00"])]
)
def test_a_dearer_kernel_or_a_fence_in_a_loop_is_named(row, broken):
    spent = budget.Budget(budget.KERNELS["cluster_row"], 2, 6.0, 6.0, row, mufu=2.0, fences=0)
    assert cuda_gate.overspent("sm_90", "cluster_row bfloat16", spent) == broken
    fenced = budget.Budget(spent.kernel, 2, 6.0, 6.0, 1.0, mufu=2.2, fences=3)
    assert len(cuda_gate.overspent("sm_90", "cluster_row bfloat16", fenced)) == 2
    assert cuda_gate.overspent("sm_90", "two_pass_row bfloat16", fenced) == []


def test_shares_are_those_of_the_nominal_floor():
    """H200: 24.7 lane-instructions while memory moves an element of bfloat16 in and out, and 3.1 special functions."""
    (h200,) = (gpu for gpu in budget.GPUS if gpu.name == "H200")
    spent = budget.Budget(budget.KERNELS["cluster_row"], 2, 10.0, 10.0, 4.7, mufu=2.0, fences=0)
    assert spent.shares(h200) == pytest.approx((1.0, 0.648), rel=0.01)


def test_generic_and_asynchronous_moves_are_counted():
    code = machine_code("LDGSTS.E.BYPASS.128 [R1], [R2]", "LD.E.128 R4, [R2]", "LDG.E R4, [R2]", "ST.E.U16 [R2], R4",
                        "STG.E.EF.128 [R2], R4", "LDS.128 R4, [R1]", "STS [R1], R4", "LDGDEPBAR",
                        "STL [R1], R4")  # fmt: skip
    measures = measure_sass(code, registers=1, stack=0)
    assert (measures.wide_loads, measures.other_loads) == (2, 1)
    assert (measures.wide_stores, measures.other_stores, measures.local) == (1, 1, 1)
