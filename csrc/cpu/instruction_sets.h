// What an instruction set offers, the passes over one row, and which of them this processor has. Each set's table is
// row_kernel.cpp, compiled once more (CMakeLists.txt).
#pragma once

#include <cstring>

#include "gft/args.h"
#if defined(GFT_ARM_KERNELS) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(GFT_ARM_KERNELS) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace gft::cpu {

// A row's softmax beside one skipped column, in nats of the transformed logits.
struct RowStatistics {
    double top;   // at most 50 below the largest transformed logit; -inf if there is nothing but -inf
    double mass;  // sum over v of e^(z_v - top); NaN if the row holds NaN or +inf
    double gap;   // sum over v of (z_v - top) * e^(z_v - top); 0 unless asked for
};

// log sum e^z as top + log_mass: kept apart, as a top of -1e20 would absorb the other.
struct Normaliser {
    double top, log_mass;
};

struct RowKernels {
    const char* name;

    // One read of the row. Column `skipped` (-1: none) counts nothing: the caller adds the target in double precision.
    // `least_top` is a lower bound of the top (-inf: none), for a caller who knows one of the transformed logits.
    RowStatistics (*statistics)(const void* row, Dtype dtype, std::int64_t V, std::int64_t skipped, double least_top,
                                const Transform& transform, bool want_gap);

    // F7 away from the target: out[v] = pi_v * (scale + tilt * (log pi_v + H)) * dz_v/dlogit, with
    // pi_v = e^(z_v - top - log_mass). `out` may be `row`.
    void (*gradient)(const void* row, void* out, Dtype dtype, std::int64_t V, const Normaliser& normaliser,
                     const RowScales<double>& scales, const Transform& transform);

    // out[v] = factor * row[v], rounded once. `out` may be `row`.
    void (*scale)(const void* row, void* out, Dtype dtype, Dtype out_dtype, std::int64_t V, float factor);
};

extern const RowKernels kernels_portable;
#if defined(GFT_X86_KERNELS)
extern const RowKernels kernels_avx2, kernels_avx512, kernels_avx512bf16;
#elif defined(GFT_ARM_KERNELS)
extern const RowKernels kernels_neon, kernels_neonbf16;
#endif

struct InstructionSet {
    const RowKernels* kernels;
    bool runs_here;
};

#if defined(GFT_ARM_KERNELS)
// GCC and Clang ask an Arm processor nothing by themselves before GCC 14 and Clang 19: the system is asked.
GFT_HD bool has_arm_bf16() {
#if defined(__APPLE__)
    int has = 0;
    std::size_t size = sizeof has;
    return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has != 0;
#elif defined(__linux__)
    constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16 of asm/hwcap.h, which older headers lack
    return (getauxval(AT_HWCAP2) & kBf16) != 0;
#else
    return false;
#endif
}
#endif

// All of this build, fastest first.
GFT_HD const InstructionSet* instruction_sets(int& count) {
#if defined(GFT_X86_KERNELS)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("x86-64-v4");
    static const InstructionSet sets[] = {
        {&kernels_avx512bf16, avx512 && __builtin_cpu_supports("avx512bf16")},
        {&kernels_avx512, avx512},
        {&kernels_avx2, avx2},
        {&kernels_portable, true},
    };
#elif defined(GFT_ARM_KERNELS)
    static const InstructionSet sets[] = {
        // NEON is part of AArch64
        {&kernels_neonbf16, has_arm_bf16()},
        {&kernels_neon, true},
        {&kernels_portable, true},
    };
#else
    static const InstructionSet sets[] = {{&kernels_portable, true}};
#endif
    count = static_cast<int>(sizeof sets / sizeof *sets);
    return sets;
}

// The fastest table this processor can run, or the one called `name`; null if the processor or the build lacks it.
GFT_HD const RowKernels* find_kernels(const char* name) {
    int count = 0;
    const InstructionSet* sets = instruction_sets(count);
    for (int i = 0; i < count; ++i) {
        const bool wanted = *name == '\0' || std::strcmp(sets[i].kernels->name, name) == 0;
        if (wanted && sets[i].runs_here) return sets[i].kernels;
    }
    return nullptr;
}

}  // namespace gft::cpu
