// The first pass over a row: its softmax beside one column. Included after one simd_*.h; the plan is in row_kernel.cpp.
#pragma once

#include <cmath>

#include "cpu/instruction_sets.h"
#include "cpu/vector_math.h"

namespace gft::cpu {
namespace {

constexpr int kBlock = 4 * Simd::kLanes;  // elements per step: four vectors hide the latency of an exponential
constexpr std::int64_t kFirst = 1024;     // elements the first anchor is taken from
constexpr std::int64_t kFlush = 8192;     // elements summed in float32 before the sums go to double
constexpr std::int64_t kAhead = 4096;     // bytes between what is summed and what is fetched
constexpr float kHeadroom = 72.0f;        // log2 of e^50: how far an element may exceed the anchor

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
        : row_(row), V_(V), whole_(V / kBlock * kBlock), warp_(warp), exponent_(warp.unit, first_anchor(least_top)) {}

    RowStatistics run(std::int64_t skipped) {
        const bool within = skipped >= 0 && skipped < whole_;
        const std::int64_t aside = within ? skipped / kBlock * kBlock : whole_;
        add_blocks(0, aside);
        if (within) {
            add_some(aside, kBlock, skipped - aside);
            add_blocks(aside + kBlock, whole_);
        }
        if (whole_ < V_) add_some(whole_, V_ - whole_, skipped - whole_);
        return {empty_ ? -INFINITY : warp_.nats(exponent_.anchor), sum(mass_), sum(gap_) * kLn2};
    }

  private:
    // The w of the largest of the first logits that hold anything but -inf. A prefix of banned tokens is no anchor: its
    // -inf would make every exponent NaN, and a 0 in its place would underflow a row of logits around -1000.
    float first_anchor(double least_top) {
        const float least = sign() * static_cast<float>(least_top / warp_.unit);
        float found = -INFINITY;
        for (std::int64_t v = 0; v < whole_ && !(found > -INFINITY); v += kFirst)
            found = largest_between(v, v + kFirst);
        if (!(found > -INFINITY) && whole_ < V_) {
            found = largest_lane(largest_in(Padded<T>(row_ + whole_, V_ - whole_).elements));
        }
        const float anchor = found > least ? found : least;
        empty_ = !(anchor > -INFINITY);
        return empty_ ? 0.0f : sign() * anchor;
    }

    // A negative logit_scale turns the order around.
    float sign() const { return warp_.unit < 0.0 ? -1.0f : 1.0f; }

    float largest_between(std::int64_t begin, std::int64_t end) const {
        Vec largest = Simd::all(-INFINITY);
        for (std::int64_t v = begin; v < end && v < whole_; v += kBlock) {
            largest = Simd::max(largest_in(row_ + v), largest);
        }
        return largest_lane(largest);
    }

    Vec largest_in(const T* p) const {  // of sign*w over a block
        const Block<T> block(p);
        Vec largest = Simd::all(-INFINITY);
        for (const Vec& z : block.z) largest = Simd::max(warp_(z) * Simd::all(sign()), largest);
        return largest;
    }

    void add_blocks(std::int64_t begin, std::int64_t end) {
        for (std::int64_t v = begin; v < end; v += kFlush) add_until_flush(v, v + kFlush < end ? v + kFlush : end);
    }

    void add_until_flush(std::int64_t begin, std::int64_t end) {
        Exponent exponent = exponent_;
        Vec mass[4] = {}, gap[4] = {}, t[4];
        for (std::int64_t v = begin; v < end; v += kBlock) {
            prefetch(row_ + v);
            const Block<T> block(row_ + v);
            exponents(block, exponent, t);
            while (__builtin_expect(Simd::any_above(largest_of(t), Simd::all(kHeadroom)), 0)) {
                flush(mass, gap);
                raise(block, t);
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
        while (Simd::any_above(largest_of(t), Simd::all(kHeadroom))) {
            raise(block, t);
            exponents(block, exponent_, t);
        }
        for (int i = 0; i < 4; ++i) add(t[i], weights.z[i] * exp2<Degree<T>::statistics>(t[i]), mass[i], gap[i]);
        flush(mass, gap);
    }

    // The first read of a row comes from memory, and the hardware's own prefetching stops at every page.
    static void prefetch(const T* p) {
        const char* ahead = reinterpret_cast<const char*>(p) + kAhead;
        for (std::size_t byte = 0; byte < kBlock * sizeof(T); byte += 64) __builtin_prefetch(ahead + byte);
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

    // Moves the anchor to the element of the largest t, and what was summed with it: with t' = t + d,
    // t'*2^t' = 2^d (t*2^t + d*2^t). The element itself, as t may have overflowed.
    void raise(const Block<T>& block, const Vec (&t)[4]) {
        float largest = kHeadroom, anchor = exponent_.anchor;
        for (int i = 0; i < 4; ++i) {
            const Vec w = warp_(block.z[i]);
            for (int lane = 0; lane < Simd::kLanes; ++lane) {
                if (!(t[i][lane] > largest)) continue;
                largest = t[i][lane];
                anchor = w[lane];
            }
        }
        const double move = exponent_.k * (static_cast<double>(exponent_.anchor) - anchor), factor = std::exp2(move);
        for (int lane = 0; lane < Simd::kLanes; ++lane) {
            if constexpr (kGap) gap_[lane] = factor * (gap_[lane] + move * mass_[lane]);
            mass_[lane] *= factor;
        }
        exponent_ = Exponent(warp_.unit, anchor);
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

}  // namespace
}  // namespace gft::cpu
