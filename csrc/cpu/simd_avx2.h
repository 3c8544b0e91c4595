// Eight floats: AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include "cpu/elements.h"

namespace gft::cpu {
namespace {

struct Simd {
    using Vec = __m256;
    static constexpr int kLanes = 8;

    static Vec all(float value) { return _mm256_set1_ps(value); }
    static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
    static Vec max(Vec number, Vec other) { return _mm256_max_ps(number, other); }  // NaN in number: other
    static bool any_above(Vec a, Vec limit) { return _mm256_movemask_ps(_mm256_cmp_ps(a, limit, _CMP_GT_OQ)) != 0; }
    static Vec magnitude(Vec a) { return _mm256_andnot_ps(all(-0.0f), a); }
    static Vec sign_where_above(Vec a, Vec limit, Vec otherwise) {  // +-1 where |a| > limit
        const Vec one = _mm256_or_ps(_mm256_and_ps(a, all(-0.0f)), all(1.0f));
        return _mm256_blendv_ps(otherwise, one, _mm256_cmp_ps(magnitude(a), limit, _CMP_GT_OQ));
    }

    // Below 2^-126 a power is a denormal here whatever t is, and counts as 0 (FlushDenormals). NaN stays.
    static Vec held(Vec t) { return _mm256_max_ps(all(-126.5f), t); }
    static Vec fraction(Vec t) { return held(t) - _mm256_floor_ps(held(t)); }
    static Vec times_power(Vec p, Vec t) {  // p * 2^floor(t), by the exponent's bits
        const __m256i power = _mm256_slli_epi32(_mm256_cvttps_epi32(_mm256_floor_ps(held(t))), 23);
        return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
    }
    static void accumulate(Vec v, double* lanes) {
        _mm256_storeu_pd(lanes, _mm256_loadu_pd(lanes) + _mm256_cvtps_pd(_mm256_castps256_ps128(v)));
        _mm256_storeu_pd(lanes + 4, _mm256_loadu_pd(lanes + 4) + _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
    }

    // A pair is 2 * kLanes neighbouring elements; which lane holds which is known to load and store only.
    static void load(const float* p, Vec& a, Vec& b) {
        a = _mm256_loadu_ps(p);
        b = _mm256_loadu_ps(p + 8);
    }
    static void store(float* p, Vec a, Vec b) {
        _mm256_storeu_ps(p, a);
        _mm256_storeu_ps(p + 8, b);
    }

    // Even elements are the low halves of 32-bit words, odd ones the high halves: no shuffle.
    static void load(const BFloat16* p, Vec& a, Vec& b) {
        const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        a = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
        b = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
    }
    static __m256i rounded(Vec v) {  // the upper half of each word is the bfloat16
        const __m256i bits = _mm256_castps_si256(v),
                      lowest = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        return _mm256_add_epi32(bits, _mm256_add_epi32(lowest, _mm256_set1_epi32(0x7fff)));
    }
    static void store(BFloat16* p, Vec a, Vec b) {
        const __m256i even = _mm256_srli_epi32(rounded(a), 16);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_blend_epi16(even, rounded(b), 0xaa));
    }

    static void load(const Float16* p, Vec& a, Vec& b) {
        a = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        b = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
    }
    static void store(Float16* p, Vec a, Vec b) {
        constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, kNearest));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(b, kNearest));
    }
};

}  // namespace
}  // namespace gft::cpu
