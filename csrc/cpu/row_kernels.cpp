#include "cpu/row_kernels.h"

#include <cstring>

namespace gft::cpu {
namespace {

#if defined(GFT_X86_KERNELS)
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() { return has_avx2() && __builtin_cpu_supports("x86-64-v4"); }
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

constexpr int kSets = 4;

struct Available {
    const RowKernels* kernels[kSets + 1] = {};
    const char* names[kSets + 1] = {};

    Available() {
        int count = 0;
        const auto add = [&](const RowKernels& table) {
            kernels[count] = &table;
            names[count++] = table.name;
        };
#if defined(GFT_X86_KERNELS)
        __builtin_cpu_init();
        if (has_avx512_bf16()) add(kAvx512Bf16Kernels);
        if (has_avx512()) add(kAvx512Kernels);
        if (has_avx2()) add(kAvx2Kernels);
#endif
        add(kPortableKernels);
    }
};

const Available& available() {
    static const Available sets;
    return sets;
}

}  // namespace

const RowKernels* find_kernels(const char* name) {
    const Available& sets = available();
    if (name == nullptr || *name == '\0') return sets.kernels[0];
    for (int i = 0; sets.kernels[i] != nullptr; ++i) {
        if (std::strcmp(sets.names[i], name) == 0) return sets.kernels[i];
    }
    return nullptr;
}

const char* const* kernel_names() { return available().names; }

}  // namespace gft::cpu
