#include "cpu/simd_avx512.h"
//
#include "cpu/row_kernel.h"

namespace gft::cpu {

const RowKernels kAvx512Bf16Kernels = kernels_named("avx512bf16");

}  // namespace gft::cpu
