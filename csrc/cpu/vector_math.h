// 2^t, tanh and the logit's transform on vectors. Included after one simd_*.h, in an anonymous namespace as all of
// them.
#pragma once

#include "cpu/elements.h"
#include "gft/args.h"

namespace gft::cpu {
namespace {

using Vec = Simd::Vec;

constexpr double kLog2e = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// Coefficients in ascending powers; fit_coefficients.py prints them.
constexpr float kExp2Degree3[] = {0.999925219f, 0.69583354f, 0.226067158f, 0.0780245212f};
constexpr float kExp2Degree4[] = {1.00000259f, 0.693003835f, 0.241442757f, 0.0520114609f, 0.0135341677f};
constexpr float kExp2Degree5[] = {0.999999925f, 0.693153073f,   0.240153617f,
                                  0.055826318f, 0.00898934013f, 0.00187757666f};
constexpr float kTanhOver[] = {0.999999993f,     0.130831577f,    0.00310300226f,  1.11442655e-05f,
                               -2.01840059e-08f, 5.25779699e-11f, -8.43609085e-14f};
constexpr float kTanhUnder[] = {1.0f, 0.464164847f, 0.0244913847f, 0.000254475251f};

// What a dtype's own rounding leaves visible of the exponential: relative errors 7.5e-8, 2.6e-6 and 7.5e-5 for degrees
// 5, 4 and 3, against half a unit of 2^-24 (float), 2^-11 (half) and 2^-9 (bfloat16).
template <class T>
struct Degree;
template <>
struct Degree<float> {
    static constexpr int statistics = 5, gradient = 5;
};
template <>
struct Degree<Float16> {
    static constexpr int statistics = 4, gradient = 4;
};
template <>
struct Degree<BFloat16> {
    static constexpr int statistics = 4, gradient = 3;
};

template <int kTerms>
Vec polynomial(Vec x, const float (&coefficients)[kTerms]) {
    Vec sum = Simd::all(coefficients[kTerms - 1]);
#pragma GCC unroll 8
    for (int i = kTerms - 2; i >= 0; --i) sum = Simd::fma(sum, x, Simd::all(coefficients[i]));
    return sum;
}

template <int kDegree>
Vec exp2(Vec t) {
    const Vec f = Simd::fraction(t);
    if constexpr (kDegree == 3) return Simd::times_power(polynomial(f, kExp2Degree3), t);
    if constexpr (kDegree == 4) return Simd::times_power(polynomial(f, kExp2Degree4), t);
    if constexpr (kDegree == 5) return Simd::times_power(polynomial(f, kExp2Degree5), t);
}

Vec tanh(Vec x) {
    const Vec square = x * x;
    const Vec ratio = x * polynomial(square, kTanhOver) / polynomial(square, kTanhUnder);
    return Simd::sign_where_above(x, Simd::all(9.02f), ratio);  // there float32 rounds tanh to 1
}

// w(z) = z. `nats` is the transformed logit of a w, in the operations of gft::transform, so that equal is equal.
struct Linear {
    double unit;  // transformed nats per w
    Transform transform;
    explicit Linear(const Transform& t) : unit(t.logit_scale / t.temperature), transform(t) {}
    Vec operator()(Vec z) const { return z; }
    double nats(float w) const { return w * transform.logit_scale / transform.temperature; }
    double slope() const { return unit; }
    template <int kDegree>
    Vec bent(Vec gradient, Vec) const {
        return gradient;
    }
};

// w(z) = tanh(z * logit_scale / softcap); the slope of the transformed logit has a factor 1 - w^2.
struct Softcapped {
    double unit;
    Transform transform;
    Vec inner;
    explicit Softcapped(const Transform& t)
        : unit(t.softcap / t.temperature),
          transform(t),
          inner(Simd::all(static_cast<float>(t.logit_scale / t.softcap))) {}
    Vec operator()(Vec z) const { return tanh(z * inner); }
    double nats(float w) const { return transform.softcap * w / transform.temperature; }
    double slope() const { return transform.logit_scale / transform.temperature; }
    template <int kDegree>
    Vec bent(Vec gradient, Vec z) const {  // 1 - w^2 as in gft::transform_slope: near saturation it has no digits
        const Vec decay = exp2<kDegree>(Simd::magnitude(z * inner) * Simd::all(static_cast<float>(-2.0 * kLog2e)));
        const Vec one_more = decay + Simd::all(1.0f);
        return gradient * Simd::all(4.0f) * decay / (one_more * one_more);
    }
};

// t = (w - anchor)*k.
struct Exponent {
    float k, anchor;
    Vec k_all, anchor_all;
    Exponent(double unit, float anchor)
        : k(static_cast<float>(unit * kLog2e)), anchor(anchor), k_all(Simd::all(k)), anchor_all(Simd::all(anchor)) {}
    Vec operator()(Vec w) const { return (w - anchor_all) * k_all; }
};

}  // namespace
}  // namespace gft::cpu
