#include "cpu/simd_portable.h"
//
#include "cpu/row_kernel.h"

namespace gft::cpu {

const RowKernels kPortableKernels = kernels_named("portable");

}  // namespace gft::cpu
