// What an instruction set offers: the passes over one row. Each set is one translation unit that defines one table.
#pragma once

#include "gft/args.h"

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
    void (*scale)(const void* row, void* out, Dtype dtype, std::int64_t V, float factor);
};

extern const RowKernels kPortableKernels;
#if defined(GFT_X86_KERNELS)
extern const RowKernels kAvx2Kernels;
extern const RowKernels kAvx512Kernels;
extern const RowKernels kAvx512Bf16Kernels;
#endif

// The fastest table this processor can run, or the one called `name`; null if the processor or the build lacks it.
const RowKernels* find_kernels(const char* name);

// The names `find_kernels` answers on this processor, fastest first; null-terminated.
const char* const* kernel_names();

}  // namespace gft::cpu
