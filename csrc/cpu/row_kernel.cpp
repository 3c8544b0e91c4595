// The two passes over a row, compiled once for every instruction set: GFT_INSTRUCTION_SET is its name, GFT_SIMD_HEADER
// the vectors it brings.
//
// Statistics sum 2^t over the row and the gradient recomputes 2^t, with t = (w(z) - anchor)*k: k holds log2(e),
// logit_scale and 1/temperature; w is z itself or tanh(z*logit_scale/softcap). Recomputing is cheaper than storing: the
// row comes back from cache, and the exponential is a short polynomial. Subtracting first keeps every digit of logits
// that share an offset of 1e4.
//
// The anchor needs no pass of its own. It is the largest of the first 1024 elements, and a block that exceeds it by
// more than e^50 moves it (float32 has room for e^88 over any vocabulary); a row almost never does.
//
// Everything is in an anonymous namespace: with external linkage the linker would keep one copy for all sets.
#if !defined(GFT_INSTRUCTION_SET)
#define GFT_INSTRUCTION_SET portable
#define GFT_SIMD_HEADER "cpu/simd_portable.h"
#endif
#include GFT_SIMD_HEADER
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/instruction_sets.h"
#include "cpu/row_statistics.h"
#include "cpu/vector_math.h"

namespace gft::cpu {
namespace {

// Float denormals as zero for the time of a pass: a row with a wide spread would otherwise trap into microcode for
// every tiny probability, at a hundred times the cost. Conversions to and from fp16 ignore the flags and keep its
// denormals.
#if defined(__SSE__)
class FlushDenormals {
  public:
    FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }  // results (FTZ) and operands (DAZ)
    ~FlushDenormals() { _mm_setcsr(saved_); }
    FlushDenormals(const FlushDenormals&) = delete;
    FlushDenormals& operator=(const FlushDenormals&) = delete;

  private:
    unsigned saved_;
};
#else
struct FlushDenormals {  // elsewhere denormals cost little
    FlushDenormals() {}
};
#endif

// As a float, and NaN as one NaN. The vectors round to bfloat16 by adding half a unit, which from a NaN of all ones
// would carry into the sign: a NaN of a bfloat16 row, or of arithmetic, has a lower half of zeros, and so has this one.
float single(double value) { return value == value ? static_cast<float>(value) : NAN; }

// F7 away from the target, block by block; `out` may be `row`. The anchor is near the log-normaliser, so that neither
// the powers nor the factor leave float's range; what its rounding leaves over is part of the factor: taken in
// nats, for a w that goes there and back comes back as another double, which k = 1e14 makes a nat of. With t near
// log2 pi_v at hand, an entropy's tilt makes the factor linear in t: kTilted.
template <bool kTilted, class T, class Warp>
void write_gradient(const T* row, T* out, std::int64_t V, const Normaliser& given, const RowScales<double>& scales,
                    const Warp& warp) {
    const Exponent exponent(warp.unit, static_cast<float>((given.top + given.log_mass) / warp.unit));
    const double rest_of_t = kLog2e * ((warp.nats(exponent.anchor) - given.top) - given.log_mass);  // log2 pi_v - t
    const double size = warp.slope() * std::exp2(rest_of_t);
    const double at_zero = kTilted ? scales.scale + scales.tilt * (scales.entropy + kLn2 * rest_of_t) : scales.scale;
    const Vec factor = Simd::all(single(at_zero * size));
    const Vec per_t = Simd::all(single(scales.tilt * kLn2 * size));
    const auto step = [&](const T* from, T* to) {
        Block<T> block(from);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const Vec z = block.z[i];
            constexpr int kDegree = Degree<T>::gradient;
            const Vec t = exponent(warp(z));
            Vec share = factor;
            if constexpr (kTilted) share = Simd::fma(Simd::max(t, Simd::all(-200.0f)), per_t, factor);  // no -inf * 0
            block.z[i] = warp.template bent<kDegree>(exp2<kDegree>(t) * share, z);
        }
        block.store(to);
    };
    std::int64_t v = 0;
    for (; v + kBlock <= V; v += kBlock) step(row + v, out + v);
    if (v == V) return;
    Padded<T> rest(row + v, V - v);
    step(rest.elements, rest.elements);
    std::memcpy(out + v, rest.elements, static_cast<std::size_t>(V - v) * sizeof(T));
}

template <class T>
void write_scaled(const T* row, T* out, std::int64_t V, float factor) {
    const Vec factors = Simd::all(single(factor));
    std::int64_t v = 0;
    for (; v + kBlock <= V; v += kBlock) {
        Block<T> block(row + v);
        for (Vec& z : block.z) z = z * factors;
        block.store(out + v);
    }
    for (; v < V; ++v) narrow(widen(row[v]) * factor, out[v]);
}

// From the table's plain arguments to one of the templates above.
template <class Then>
auto with_dtype(Dtype dtype, Then then) {
    if (dtype == Dtype::f32) return then(float{});
    if (dtype == Dtype::bf16) return then(BFloat16{});
    return then(Float16{});
}

template <class Then>
auto with_warp(const Transform& transform, Then then) {
    return transform.softcap == 0.0 ? then(Linear(transform)) : then(Softcapped(transform));
}

RowStatistics statistics_of_row(const void* row, Dtype dtype, std::int64_t V, std::int64_t skipped, double least_top,
                                const Transform& transform, bool want_gap) {
    const FlushDenormals flush;
    return with_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        return with_warp(transform, [&](const auto& warp) {
            using Warp = std::decay_t<decltype(warp)>;
            const T* logits = static_cast<const T*>(row);
            if (want_gap) return Statistics<T, Warp, true>(logits, V, warp, least_top).run(skipped);
            return Statistics<T, Warp, false>(logits, V, warp, least_top).run(skipped);
        });
    });
}

void gradient_of_row(const void* row, void* out, Dtype dtype, std::int64_t V, const Normaliser& normaliser,
                     const RowScales<double>& scales, const Transform& transform) {
    const FlushDenormals flush;
    with_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        with_warp(transform, [&](const auto& warp) {
            const T* logits = static_cast<const T*>(row);
            T* gradient = static_cast<T*>(out);
            if (scales.tilt == 0.0) return write_gradient<false>(logits, gradient, V, normaliser, scales, warp);
            write_gradient<true>(logits, gradient, V, normaliser, scales, warp);
        });
    });
}

void scale_row(const void* row, void* out, Dtype dtype, Dtype out_dtype, std::int64_t V, float factor) {
    with_dtype(out_dtype, [&](auto element) {
        using T = decltype(element);
        T* const scaled = static_cast<T*>(out);
        if (dtype == out_dtype) return write_scaled(static_cast<const T*>(row), scaled, V, factor);
        for (std::int64_t v = 0; v < V; ++v) narrow(static_cast<const float*>(row)[v] * factor, scaled[v]);
    });
}

}  // namespace

#define GFT_STRING(name) #name
#define GFT_TABLE(name)                     \
    extern const RowKernels kernels_##name; \
    const RowKernels kernels_##name = {GFT_STRING(name), statistics_of_row, gradient_of_row, scale_row}
#define GFT_TABLE_OF(name) GFT_TABLE(name)  // the set's name is a macro itself: expanded here, before ## sees it
GFT_TABLE_OF(GFT_INSTRUCTION_SET);

}  // namespace gft::cpu
