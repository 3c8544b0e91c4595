// Four floats: AArch64's NEON, and where the compiler is told of them, its bfloat16 instructions.
#pragma once

#include <arm_neon.h>

#include "cpu/elements.h"

namespace gft::cpu {
namespace {

struct Simd {
    using Vec = float32x4_t;
    static constexpr int kLanes = 4;

    static Vec all(float value) { return vdupq_n_f32(value); }
    static Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
    static Vec max(Vec number, Vec other) { return vmaxnmq_f32(number, other); }  // of a number and NaN: the number
    static bool any_above(Vec a, Vec limit) { return vmaxnmvq_f32(a) > vgetq_lane_f32(limit, 0); }  // all lanes alike
    static Vec magnitude(Vec a) { return vabsq_f32(a); }
    static Vec sign_where_above(Vec a, Vec limit, Vec otherwise) {  // +-1 where |a| > limit
        const Vec one = vbslq_f32(vdupq_n_u32(0x80000000u), a, all(1.0f));
        return vbslq_f32(vcagtq_f32(a, limit), one, otherwise);
    }

    static Vec fraction(Vec t) { return t - vrndmq_f32(t); }
    static Vec times_power(Vec p, Vec t) {  // p * 2^floor(t), by the exponent's bits; 0 below 2^-126
        const int32x4_t power = vshlq_n_s32(vcvtmq_s32_f32(t), 23);
        const uint32x4_t product = vreinterpretq_u32_s32(vaddq_s32(vreinterpretq_s32_f32(p), power));
        return vreinterpretq_f32_u32(vbicq_u32(product, vcltq_f32(t, all(-126.0f))));  // NaN is not below: it stays
    }
    static void accumulate(Vec v, double* lanes) {
        vst1q_f64(lanes, vld1q_f64(lanes) + vcvt_f64_f32(vget_low_f32(v)));
        vst1q_f64(lanes + 2, vld1q_f64(lanes + 2) + vcvt_high_f64_f32(v));
    }

    // A pair is 2 * kLanes neighbouring elements, in order.
    static void load(const float* p, Vec& a, Vec& b) {
        a = vld1q_f32(p);
        b = vld1q_f32(p + 4);
    }
    static void store(float* p, Vec a, Vec b) {
        vst1q_f32(p, a);
        vst1q_f32(p + 4, b);
    }

    static void load(const BFloat16* p, Vec& a, Vec& b) {
        const uint16x8_t halves = vld1q_u16(&p->bits);
        a = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(halves), 16));
        b = vreinterpretq_f32_u32(vshll_high_n_u16(halves, 16));
    }
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    static void store(BFloat16* p, Vec a, Vec b) {
        vst1q_bf16(reinterpret_cast<bfloat16_t*>(p), vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(a), b));
    }
#else
    static uint32x4_t rounded(Vec v) {  // the upper half of each word is the bfloat16
        const uint32x4_t bits = vreinterpretq_u32_f32(v);
        const uint32x4_t lowest = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        return vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), lowest);
    }
    static void store(BFloat16* p, Vec a, Vec b) {
        const uint16x8_t first = vreinterpretq_u16_u32(rounded(a)), second = vreinterpretq_u16_u32(rounded(b));
        vst1q_u16(&p->bits, vuzp2q_u16(first, second));
    }
#endif

    static void load(const Float16* p, Vec& a, Vec& b) {
        const float16x8_t halves = vreinterpretq_f16_u16(vld1q_u16(&p->bits));
        a = vcvt_f32_f16(vget_low_f16(halves));
        b = vcvt_high_f32_f16(halves);
    }
    static void store(Float16* p, Vec a, Vec b) {
        vst1q_u16(&p->bits, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(a), b)));
    }
};

}  // namespace
}  // namespace gft::cpu
