// From every thread's running softmax to the row's: lanes, warps, blocks, always in the same order.
#pragma once

#include "cuda/softmax.cuh"

namespace gft::cuda {

constexpr int kMaxWarps = 32;

template <bool kEntropy>
GFT_DEVICE Softmax merge_lanes(Softmax state) {
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
        const Softmax other = {shuffle_xor(state.top, lanes), shuffle_xor(state.mass, lanes),
                               kEntropy ? shuffle_xor(state.gap, lanes) : 0.0f};
        state = merge_softmax<kEntropy>(state, other);
    }
    // An fma rounds a + b and b + a differently, so partners may end an ulp apart: all take lane 0's result.
    return {shuffle_first(state.top), shuffle_first(state.mass), kEntropy ? shuffle_first(state.gap) : 0.0f};
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
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += shuffle_xor(value, lanes);
    block_barrier();  // the previous sum has been read
    if (lane == 0) warps[warp] = value;
    block_barrier();
    Number sum{};
    for (int i = 0; i < thread_count() / kWarp; ++i) sum += warps[i];
    return sum;
}

}  // namespace gft::cuda
