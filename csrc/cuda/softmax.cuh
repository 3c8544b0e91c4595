// The running softmax of F1 and F2 in base 2, which is what the special-function units compute, and the logits' way
// into it. z is the logit the loss sees in units of log 2, so that e^z (nats) is 2^z here.
#pragma once

#include <cfloat>
#include <cmath>

#include "cuda/device.cuh"
#include "cuda/plan.h"
#include "gft/formulas.h"

namespace gft::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// How a logit becomes z. Plain: z = slope * logit with slope > 0, and the multiplication is part of each fma.
// Bent (softcap, or a negative scale): bend() has multiplied, slope is 1.
struct View {
    float slope;
    bool bent;
    float cap;  // bent with softcap: z = cap * tanh(inner * logit); 0: z = inner * logit
    float inner;
    float chain;  // d(transformed logit)/d(logit) in nats, before the softcap's 1 - tanh^2
};

inline View view_of(const Transform& transform) {
    const double chain = transform.logit_scale / transform.temperature;
    const double log2e = 1.4426950408889634;
    View view{};
    view.chain = static_cast<float>(chain);
    view.bent = transform.softcap != 0.0 || chain < 0.0;
    view.slope = view.bent ? 1.0f : static_cast<float>(chain * log2e);
    view.cap = static_cast<float>(transform.softcap / transform.temperature * log2e);
    view.inner =
        static_cast<float>(transform.softcap != 0.0 ? transform.logit_scale / transform.softcap : chain * log2e);
    return view;
}

// A logit after bending, and what a softcap takes off its slope there: 1 - tanh^2.
struct Bent {
    float z, curve;
};

// With e = exp(-2|x|): tanh |x| = (1 - e) / (1 + e), off by about 1e-7 of its range as a softcap of 30 to 50 needs it,
// and 1 - tanh^2 = 4e / (1 + e)^2, which keeps its digits where tanh saturates.
GFT_DEVICE Bent bend_one(float logit, const View& view) {
    const float inner = view.inner * logit;
    if (view.cap == 0.0f) return {inner, 1.0f};
    const float e = exp2_fast(-2.0f * kLog2E * fabsf(inner));
    const float share = reciprocal_fast(1.0f + e);
    return {view.cap * copysignf((1.0f - e) * share, inner), 4.0f * e * share * share};
}

template <int kSize>
GFT_DEVICE void bend(float (&logits)[kSize], const View& view) {
    if (!view.bent) return;
#pragma unroll
    for (int j = 0; j < kSize; ++j) logits[j] = bend_one(logits[j], view).z;
}

// (top, mass): mass counts in units of 2^top. gap = sum (z - top) * 2^(z - top), which the entropy is made of.
// Neutral: (-FLT_MAX, 0, 0). A finite top needs no special case at 2^(top - top), and no z but -inf lies below it.
struct Softmax {
    float top, mass, gap;
};

GFT_DEVICE Softmax empty_softmax() { return {-FLT_MAX, 0.0f, 0.0f}; }

template <bool kEntropy>
GFT_DEVICE void move_top(Softmax& state, float top) {
    const float down = state.top - top;
    const float shrink = exp2_fast(down);
    // shrink = 0 covers the neutral state, whose distance may be -inf: 0 and not -inf * 0
    if (kEntropy) state.gap = shrink == 0.0f ? 0.0f : shrink * fmaf(down, state.mass, state.gap);
    state.mass *= shrink;
    state.top = top;
}

template <int kSize>
GFT_DEVICE float highest(const float (&logits)[kSize]) {
    float high = logits[0];
#pragma unroll
    for (int j = 1; j < kSize; ++j) high = fmaxf(high, logits[j]);
    return high;
}

// F1 for a handful of bent logits and the highest of them: one comparison, and a rescaling that soon becomes rare.
// NaN passes fmaxf and reaches the mass; +inf makes top infinite and the mass NaN.
template <bool kEntropy, int kSize>
GFT_DEVICE void observe(Softmax& state, const float (&logits)[kSize], float high, float slope) {
    high *= slope;
    if (high > state.top) move_top<kEntropy>(state, high);
    Pair mass{}, gap{};
#pragma unroll
    for (int j = 0; j < kSize; j += 2) {
        const Pair z{logits[j], j + 1 < kSize ? logits[j + 1] : -INFINITY};
        // one rounding: an offset of 1e4 costs no digits
        const Pair down = fma_pair(z, {slope, slope}, {-state.top, -state.top});
        const Pair weight{exp2_fast(down.x), exp2_fast(down.y)};
        mass = j == 0 ? weight : add_pair(mass, weight);
        // 2^-200 is 0 as well, and -200 * 0 is 0 where -inf * 0 is not
        if (kEntropy) gap = fma_pair({fmaxf(down.x, -200.0f), fmaxf(down.y, -200.0f)}, weight, gap);
    }
    state.mass += mass.x + mass.y;
    if (kEntropy) state.gap += gap.x + gap.y;
}

template <bool kEntropy, int kSize>
GFT_DEVICE void observe(Softmax& state, const float (&logits)[kSize], float slope) {
    observe<kEntropy>(state, logits, highest(logits), slope);
}

// ---- from every thread's state to the row's: lanes, warps, blocks, always in the same order ----

constexpr int kMaxWarps = 32;

template <class Number>
GFT_DEVICE Number sum_lanes(Number value) {
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += shuffle_xor(value, lanes);
    return value;  // the same bits in all lanes: partners add the same two numbers
}

// F2.
template <bool kEntropy>
GFT_DEVICE Softmax merge_lanes(Softmax state) {
    float top = state.top;
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) top = fmaxf(top, shuffle_xor(top, lanes));
    move_top<kEntropy>(state, top);
    return {top, sum_lanes(state.mass), kEntropy ? sum_lanes(state.gap) : 0.0f};
}

GFT_DEVICE uint4 letter_of(Softmax state) {
    return {bits_of_float(state.top), bits_of_float(state.mass), bits_of_float(state.gap), 0};
}

GFT_DEVICE Softmax state_of(uint4 letter) {
    return {float_of_bits(letter.x), float_of_bits(letter.y), float_of_bits(letter.z)};
}

// The block's state, in the lanes of warp 0 only. `warps` is read until the caller's next barrier.
template <bool kEntropy>
GFT_DEVICE Softmax merge_warps(Softmax state, Softmax* warps) {
    const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
    state = merge_lanes<kEntropy>(state);
    if (lane == 0) warps[warp] = state;
    block_barrier();
    if (warp != 0) return state;
    return merge_lanes<kEntropy>(lane < thread_count() / kWarp ? warps[lane] : empty_softmax());
}

// The sum of a block, in a fixed order, in every thread. `warps` holds kMaxWarps values.
template <class Number>
GFT_DEVICE Number sum_block(Number value, Number* warps) {
    const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
    value = sum_lanes(value);
    block_barrier();  // the previous sum has been read
    if (lane == 0) warps[warp] = value;
    block_barrier();
    Number sum{};
    for (int i = 0; i < thread_count() / kWarp; ++i) sum += warps[i];
    return sum;
}

}  // namespace gft::cuda
