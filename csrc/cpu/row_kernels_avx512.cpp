#include "cpu/simd_avx512.h"
//
#include "cpu/row_kernel.h"

namespace gft::cpu {

const RowKernels kAvx512Kernels = kernels_named("avx512");

}  // namespace gft::cpu
