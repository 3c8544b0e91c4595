// Four floats in the compiler's own vector type (GCC and Clang): SSE2 on x86, NEON on aarch64, plain code elsewhere.
#pragma once

#include "cpu/elements.h"

namespace gft::cpu {
namespace {

struct Simd {
    typedef float Vec __attribute__((vector_size(16)));
    typedef std::int32_t Words __attribute__((vector_size(16)));
    static constexpr int kLanes = 4;

    static Vec all(float value) { return Vec{value, value, value, value}; }
    static Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
    static Vec max(Vec number, Vec other) { return number > other ? number : other; }  // NaN in number: other
    static bool any_above(Vec a, Vec limit) {
        const Words above = a > limit;
        return (above[0] | above[1] | above[2] | above[3]) != 0;
    }
    static Vec magnitude(Vec a) { return (Vec)((Words)a & 0x7fffffff); }
    static Vec sign_where_above(Vec a, Vec limit, Vec otherwise) {  // +-1 where |a| > limit
        const Vec one = (Vec)(((Words)a & ~0x7fffffff) | (Words)all(1.0f));
        return magnitude(a) > limit ? one : otherwise;
    }

    static Words floor_of(Vec t) {  // for t in [-127, 127]
        const Words truncated = __builtin_convertvector(t, Words);
        return truncated + (__builtin_convertvector(truncated, Vec) > t);  // a true comparison is -1
    }
    static Vec at_least_minus_127(Vec t) { return t < all(-127.0f) ? all(-127.0f) : t; }  // NaN stays
    static Vec fraction(Vec t) {
        const Vec held = at_least_minus_127(t);
        return held - __builtin_convertvector(floor_of(held), Vec);
    }
    static Vec times_power(Vec p, Vec t) {  // p * 2^floor(t), by the exponent's bits; 0 below 2^-126
        const Vec product = (Vec)((Words)p + (floor_of(at_least_minus_127(t)) << 23));
        return t < all(-126.0f) ? all(0.0f) : product;
    }
    static void accumulate(Vec v, double* lanes) {
        for (int i = 0; i < kLanes; ++i) lanes[i] += v[i];
    }

    // A pair is 2 * kLanes neighbouring elements, in order.
    template <class T>
    static void load(const T* p, Vec& a, Vec& b) {
        a = b = Vec{};
        for (int i = 0; i < kLanes; ++i) {
            a[i] = widen(p[i]);
            b[i] = widen(p[i + kLanes]);
        }
    }
    template <class T>
    static void store(T* p, Vec a, Vec b) {
        for (int i = 0; i < kLanes; ++i) {
            narrow(a[i], p[i]);
            narrow(b[i], p[i + kLanes]);
        }
    }
};

}  // namespace
}  // namespace gft::cpu
