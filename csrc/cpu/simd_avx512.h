// Sixteen floats: AVX-512 F, BW, DQ and VL; AVX512_BF16 where the translation unit is compiled with it.
#pragma once

#include <immintrin.h>

#include "cpu/elements.h"

namespace gft::cpu {
namespace {

struct Simd {
    using Vec = __m512;
    static constexpr int kLanes = 16;

    static Vec all(float value) { return _mm512_set1_ps(value); }
    static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
    static Vec max(Vec number, Vec other) { return _mm512_max_ps(number, other); }  // NaN in number: other
    static bool any_above(Vec a, Vec limit) { return _mm512_cmp_ps_mask(a, limit, _CMP_GT_OQ) != 0; }
    static Vec magnitude(Vec a) { return _mm512_abs_ps(a); }
    static Vec sign_where_above(Vec a, Vec limit, Vec otherwise) {  // +-1 where |a| > limit
        const __m512 one = _mm512_or_ps(_mm512_and_ps(a, all(-0.0f)), all(1.0f));
        return _mm512_mask_mov_ps(otherwise, _mm512_cmp_ps_mask(magnitude(a), limit, _CMP_GT_OQ), one);
    }

    static Vec fraction(Vec t) { return _mm512_reduce_ps(t, 0x01); }         // t - floor(t); 0 at -inf
    static Vec times_power(Vec p, Vec t) { return _mm512_scalef_ps(p, t); }  // p * 2^floor(t)
    static void accumulate(Vec v, double* lanes) {
        _mm512_storeu_pd(lanes, _mm512_add_pd(_mm512_loadu_pd(lanes), _mm512_cvtps_pd(_mm512_castps512_ps256(v))));
        _mm512_storeu_pd(lanes + 8,
                         _mm512_add_pd(_mm512_loadu_pd(lanes + 8), _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))));
    }

    // A pair is 2 * kLanes neighbouring elements; which lane holds which is known to load and store only.
    static void load(const float* p, Vec& a, Vec& b) {
        a = _mm512_loadu_ps(p);
        b = _mm512_loadu_ps(p + 16);
    }
    static void store(float* p, Vec a, Vec b) {
        _mm512_storeu_ps(p, a);
        _mm512_storeu_ps(p + 16, b);
    }

    // Even elements are the low halves of 32-bit words, odd ones the high halves: no shuffle.
    static void load(const BFloat16* p, Vec& a, Vec& b) {
        const __m512i words = _mm512_loadu_si512(p);
        a = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
        b = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
    }
#if defined(__AVX512BF16__)
    static void store(BFloat16* p, Vec a, Vec b) {
        const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                                    22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
        _mm512_storeu_si512(p, _mm512_permutexvar_epi16(interleave, halves));
    }
#else
    static __m512i rounded(Vec v) {  // the upper half of each word is the bfloat16
        const __m512i bits = _mm512_castps_si512(v);
        const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
        const __m512i half = _mm512_mask_blend_epi32(odd, _mm512_set1_epi32(0x7fff), _mm512_set1_epi32(0x8000));
        return _mm512_add_epi32(bits, half);
    }
    static void store(BFloat16* p, Vec a, Vec b) {
        const __m512i even = _mm512_srli_epi32(rounded(a), 16);
        _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaau, even, rounded(b)));
    }
#endif

    static void load(const Float16* p, Vec& a, Vec& b) {
        a = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        b = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)));
    }
    static void store(Float16* p, Vec a, Vec b) {
        constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, kNearest));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16), _mm512_cvtps_ph(b, kNearest));
    }
};

}  // namespace
}  // namespace gft::cpu
