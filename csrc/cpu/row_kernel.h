// The two passes over a row, once for every instruction set: a translation unit includes one simd_*.h, then this file.
//
// Statistics sum 2^t over the row and the gradient recomputes 2^t, with t = k*w(z) - bias in units of log 2: k holds
// log2(e), logit_scale and 1/temperature; w is z itself or tanh(z*logit_scale/softcap). Recomputing is cheaper than
// storing: the row comes back from cache, and the exponential is a short polynomial.
//
// The reference `bias` needs no pass of its own. It is the largest of the first 1024 elements, and a block that exceeds
// it by more than e^50 moves it (float32 has room for e^88 times any vocabulary); a row almost never does.
//
// Everything is in an anonymous namespace: with external linkage the linker would keep one copy for all sets.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/row_kernels.h"

namespace gft::cpu {
namespace {

using Vec = Simd::Vec;

constexpr int kBlock = 4 * Simd::kLanes;      // elements per step: four vectors hide the latency of an exponential
constexpr std::int64_t kFirst = 1024;         // elements the first reference is taken from
constexpr std::int64_t kFlush = 8192;         // elements summed in float32 before the sums go to double
constexpr float kHeadroom = 72.0f;            // log2 of e^50: how far an element may exceed the reference
constexpr double kLog2e = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// Coefficients in ascending powers; fit_coefficients.py prints them.
constexpr float kExp2Degree3[] = {0.999925219f, 0.69583354f, 0.226067158f, 0.0780245212f};
constexpr float kExp2Degree4[] = {1.00000259f, 0.693003835f, 0.241442757f, 0.0520114609f, 0.0135341677f};
constexpr float kExp2Degree5[] = {0.999999925f, 0.693153073f,  0.240153617f,
                                  0.055826318f, 0.00898934013f, 0.00187757666f};
constexpr float kTanhOver[] = {0.999999993f,    0.130831577f,   0.00310300226f,  1.11442655e-05f,
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

// w(z) = z, and the slope of the transformed logit.
struct Linear {
    double unit;  // transformed nats per w
    explicit Linear(const Transform& transform) : unit(transform.logit_scale / transform.temperature) {}
    Vec operator()(Vec z) const { return z; }
    double slope() const { return unit; }
    Vec bent(Vec gradient, Vec) const { return gradient; }
};

// w(z) = tanh(z * logit_scale / softcap); the slope loses a factor 1 - w^2.
struct Softcapped {
    double unit, constant_slope;
    Vec inner;
    explicit Softcapped(const Transform& transform)
        : unit(transform.softcap / transform.temperature),
          constant_slope(transform.logit_scale / transform.temperature),
          inner(Simd::all(static_cast<float>(transform.logit_scale / transform.softcap))) {}
    Vec operator()(Vec z) const { return tanh(z * inner); }
    double slope() const { return constant_slope; }
    Vec bent(Vec gradient, Vec w) const { return gradient * Simd::fma(-w, w, Simd::all(1.0f)); }
};

// t = k*w - bias. The float k is off by a relative 1e-8 or so; because statistics and gradient share it and the bias is
// taken times the same k, only gaps between logits feel it, never a common offset of 1e4.
struct Exponent {
    float k;
    double bias;  // what is subtracted, exactly
    Vec factor, offset;

    Exponent(double unit, double wanted_bias) : k(static_cast<float>(unit * kLog2e)), factor(Simd::all(k)) {
        const float rounded = static_cast<float>(Simd::kFused ? wanted_bias : wanted_bias / k);
        bias = Simd::kFused ? rounded : static_cast<double>(k) * rounded;
        offset = Simd::all(Simd::kFused ? -rounded : rounded);
    }
    Vec operator()(Vec w) const {
        if constexpr (Simd::kFused) return Simd::fma(w, factor, offset);
        return (w - offset) * factor;  // k*w rounded by itself would lose the digits an offset of 1e4 takes
    }
    // log2 units of k times nats-per-unit of the exact scale: see above.
    static double nats_per_bit(double unit) { return unit / static_cast<float>(unit * kLog2e); }
};

template <class T>
struct Block {
    Vec z[4];
    explicit Block(const T* p) {
        Simd::load(p, z[0], z[1]);
        Simd::load(p + 2 * Simd::kLanes, z[2], z[3]);
    }
    void store(T* p) const {
        Simd::store(p, z[0], z[1]);
        Simd::store(p + 2 * Simd::kLanes, z[2], z[3]);
    }
};

// Fewer than kBlock elements as a whole block; the rest repeats the first, so that nothing new can look large.
template <class T>
struct Padded {
    T elements[kBlock];
    Padded(const T* p, std::int64_t count) {
        for (int i = 0; i < kBlock; ++i) elements[i] = p[i < count ? i : 0];
    }
};

// 1 in the lanes of the first `count` elements but `skipped`, 0 elsewhere. A product with it is safe where every lane
// holds a logit of the row: what is not finite there makes the row NaN by itself.
template <class T>
Block<T> counted(std::int64_t count, std::int64_t skipped) {
    T ones[kBlock];
    for (int i = 0; i < kBlock; ++i) narrow(i < count && i != skipped ? 1.0f : 0.0f, ones[i]);
    return Block<T>(ones);
}

Vec largest_of(const Vec (&v)[4]) { return Simd::max(Simd::max(v[0], v[1]), Simd::max(v[2], v[3])); }

float largest_lane(Vec v) {
    float largest = -INFINITY;
    for (int i = 0; i < Simd::kLanes; ++i) largest = v[i] > largest ? v[i] : largest;
    return largest;
}

// The statistics of one row while it is read.
template <class T, class Warp, bool kGap>
class Statistics {
  public:
    Statistics(const T* row, std::int64_t V, const Warp& warp, double least_top)
        : row_(row), V_(V), whole_(V / kBlock * kBlock), warp_(warp), exponent_(warp.unit, first_bias(least_top)) {}

    RowStatistics run(std::int64_t skipped) {
        const bool within = skipped >= 0 && skipped < whole_;
        const std::int64_t aside = within ? skipped / kBlock * kBlock : whole_;
        add_blocks(0, aside);
        if (within) {
            add_some(aside, kBlock, skipped - aside);
            add_blocks(aside + kBlock, whole_);
        }
        if (whole_ < V_) add_some(whole_, V_ - whole_, skipped - whole_);
        const double nats_per_bit = Exponent::nats_per_bit(warp_.unit);
        return {empty_ ? -INFINITY : exponent_.bias * nats_per_bit, sum(mass_), sum(gap_) * kLn2};
    }

  private:
    // The largest of the first elements that hold anything but -inf. A prefix of banned tokens is no reference: its
    // -inf would make every exponent NaN, and a 0 in its place would underflow a row of logits around -1000.
    double first_bias(double least_top) {
        const double least = least_top / Exponent::nats_per_bit(warp_.unit);
        float found = -INFINITY;
        for (std::int64_t v = 0; v < whole_ && !(found > -INFINITY); v += kFirst) found = largest_between(v, v + kFirst);
        if (!(found > -INFINITY) && whole_ < V_) found = largest_lane(scaled(Padded<T>(row_ + whole_, V_ - whole_).elements));
        const double bias = found > least ? found : least;
        empty_ = !(bias > -INFINITY);
        return empty_ ? 0.0 : bias;
    }

    float largest_between(std::int64_t begin, std::int64_t end) {
        Vec largest = Simd::all(-INFINITY);
        for (std::int64_t v = begin; v < end && v < whole_; v += kBlock) largest = Simd::max(scaled(row_ + v), largest);
        return largest_lane(largest);
    }

    Vec scaled(const T* p) const {  // the largest k*w of a block
        const Block<T> block(p);
        const Vec k = Simd::all(static_cast<float>(warp_.unit * kLog2e));
        Vec largest = Simd::all(-INFINITY);
        for (const Vec& z : block.z) largest = Simd::max(warp_(z) * k, largest);
        return largest;
    }

    void add_blocks(std::int64_t begin, std::int64_t end) {
        for (std::int64_t v = begin; v < end; v += kFlush) add_until_flush(v, v + kFlush < end ? v + kFlush : end);
    }

    void add_until_flush(std::int64_t begin, std::int64_t end) {
        Exponent exponent = exponent_;
        Vec mass[4] = {}, gap[4] = {}, t[4];
        for (std::int64_t v = begin; v < end; v += kBlock) {
            const Block<T> block(row_ + v);
            exponents(block, exponent, t);
            if (__builtin_expect(Simd::any_above(largest_of(t), Simd::all(kHeadroom)), 0)) {
                flush(mass, gap);
                raise(t);
                exponent = exponent_;
                exponents(block, exponent, t);
            }
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) add(t[i], exp2<Degree<T>::statistics>(t[i]), mass[i], gap[i]);
        }
        flush(mass, gap);
    }

    // A block of which only `count` elements count, and not `skipped`.
    void add_some(std::int64_t v, std::int64_t count, std::int64_t skipped) {
        const Padded<T> padded(row_ + v, count);
        const Block<T> block(padded.elements), weights = counted<T>(count, skipped);
        Vec mass[4] = {}, gap[4] = {}, t[4];
        exponents(block, exponent_, t);
        if (Simd::any_above(largest_of(t), Simd::all(kHeadroom))) {
            raise(t);
            exponents(block, exponent_, t);
        }
        for (int i = 0; i < 4; ++i) add(t[i], weights.z[i] * exp2<Degree<T>::statistics>(t[i]), mass[i], gap[i]);
        flush(mass, gap);
    }

    void exponents(const Block<T>& block, const Exponent& exponent, Vec (&t)[4]) const {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) t[i] = exponent(warp_(block.z[i]));
    }

    static void add(Vec t, Vec power, Vec& mass, Vec& gap) {
        mass = mass + power;
        if constexpr (kGap) gap = Simd::fma(Simd::max(t, Simd::all(-200.0f)), power, gap);  // never -inf * 0
    }

    void flush(Vec (&mass)[4], Vec (&gap)[4]) {
        for (int i = 0; i < 4; ++i) {
            Simd::accumulate(mass[i], mass_);
            if constexpr (kGap) Simd::accumulate(gap[i], gap_);
            mass[i] = gap[i] = Simd::all(0.0f);
        }
    }

    // Moves the reference to the largest t, and what was summed with it: (t + d)*2^(t + d) = 2^d (t*2^t + d*2^t).
    void raise(const Vec (&t)[4]) {
        const Exponent raised(warp_.unit, exponent_.bias + largest_lane(largest_of(t)));
        const double move = exponent_.bias - raised.bias, factor = std::exp2(move);
        for (int lane = 0; lane < Simd::kLanes; ++lane) {
            if constexpr (kGap) gap_[lane] = factor * (gap_[lane] + move * mass_[lane]);
            mass_[lane] *= factor;
        }
        exponent_ = raised;
        empty_ = false;
    }

    static double sum(const double (&lanes)[Simd::kLanes]) {
        double total = 0.0;
        for (double lane : lanes) total += lane;
        return total;
    }

    const T* row_;
    std::int64_t V_, whole_;
    const Warp& warp_;
    bool empty_ = false;
    double mass_[Simd::kLanes] = {}, gap_[Simd::kLanes] = {};
    Exponent exponent_;
};

// F7 away from the target, block by block; `out` may be `row`.
template <class T, class Warp>
void write_gradient(const T* row, T* out, std::int64_t V, double log_normaliser, double scale, const Warp& warp) {
    const double bits = log_normaliser / Exponent::nats_per_bit(warp.unit);
    const Exponent exponent(warp.unit, bits);
    const Vec factor = Simd::all(static_cast<float>(scale * warp.slope() * std::exp2(exponent.bias - bits)));
    const auto step = [&](const T* from, T* to) {
        Block<T> block(from);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const Vec w = warp(block.z[i]);
            block.z[i] = warp.bent(exp2<Degree<T>::gradient>(exponent(w)) * factor, w);
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
    const Vec factors = Simd::all(factor);
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
    const Simd::FlushDenormals flush;
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

void gradient_of_row(const void* row, void* out, Dtype dtype, std::int64_t V, double log_normaliser, double scale,
                     const Transform& transform) {
    const Simd::FlushDenormals flush;
    with_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        with_warp(transform, [&](const auto& warp) {
            write_gradient(static_cast<const T*>(row), static_cast<T*>(out), V, log_normaliser, scale, warp);
        });
    });
}

void scale_row(const void* row, void* out, Dtype dtype, std::int64_t V, float factor) {
    with_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        write_scaled(static_cast<const T*>(row), static_cast<T*>(out), V, factor);
    });
}

constexpr RowKernels kernels_named(const char* name) { return {name, statistics_of_row, gradient_of_row, scale_row}; }

}  // namespace
}  // namespace gft::cpu
