#include "cpu/simd_avx2.h"
//
#include "cpu/row_kernel.h"

namespace gft::cpu {

const RowKernels kAvx2Kernels = kernels_named("avx2");

}  // namespace gft::cpu
