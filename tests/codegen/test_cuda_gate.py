"""The offline gate of the CUDA kernels: it must see what it is there to see."""

from __future__ import annotations

import pytest

from tests.codegen import cuda_gate

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
