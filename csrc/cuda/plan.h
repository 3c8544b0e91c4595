// How a row is cut up: plain arithmetic for host and device, no CUDA header, tested exhaustively on the host.
//
// V elements of a row = head + vectors of 16 bytes + tail. The vectors are dealt to the blocks of a cluster in slices.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gft/args.h"

namespace gft::cuda {

constexpr int kVectorBytes = 16;
constexpr int kLineVectors = 8;   // 128 bytes, one memory transaction of a warp
constexpr int kMaxCluster = 16;   // blocks; above 8 a kernel must opt in (non-portable cluster size)
constexpr int kMaxThreads = 384;  // with 56 registers each, three blocks fill a multiprocessor's 65536
constexpr int kWarp = 32;
constexpr int kStages = 4;  // groups of asynchronous copies, so that statistics start after the first quarter

GFT_HD std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
GFT_HD std::int64_t at_most(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
GFT_HD int at_most(int a, int b) { return a < b ? a : b; }

// ---- one row ----

struct Split {
    int head;     // elements before the first 16-byte boundary
    int vectors;  // whole 16-byte vectors
    int tail;     // elements after the last
};

// V = 50257 in bf16: row 1 starts 2 bytes past a boundary, so head 7, vectors 6281, tail 2.
GFT_HD Split split_row(std::uintptr_t address, std::int64_t V, int element_bytes) {
    const int width = kVectorBytes / element_bytes;
    const int past = static_cast<int>(address % kVectorBytes) / element_bytes;
    const std::int64_t head = at_most(std::int64_t{past == 0 ? 0 : width - past}, V);
    const std::int64_t vectors = (V - head) / width;
    return {static_cast<int>(head), static_cast<int>(vectors), static_cast<int>(V - head - vectors * width)};
}

// Vectors a block needs room for, in whole lines, when `blocks` share a row of at most V / width vectors.
GFT_HD int slice_capacity(std::int64_t V, int element_bytes, int blocks) {
    const std::int64_t vectors = V / (kVectorBytes / element_bytes);
    return static_cast<int>(ceil_div(ceil_div(vectors, blocks), kLineVectors) * kLineVectors);
}

struct Slice {
    int first, count;  // in vectors
};

GFT_HD Slice slice_of(int vectors, int capacity, int rank) {
    const auto first = static_cast<int>(at_most(std::int64_t{rank} * capacity, std::int64_t{vectors}));
    return {first, at_most(capacity, vectors - first)};
}

constexpr int kEdge = 8;  // lanes for a row's head, and as many for its tail: both are shorter than a vector

// The element outside the vectors that a thread looks after, or -1: head elements belong to the first lanes of the
// first block's first warp, tail elements to the next lanes of the last block's.
GFT_HD int edge_element(Split split, std::int64_t V, int thread, bool first_block, bool last_block) {
    if (first_block && thread < split.head) return thread;
    const int behind = thread - kEdge;
    if (last_block && behind >= 0 && behind < split.tail) return static_cast<int>(V) - split.tail + behind;
    return -1;
}

// ---- one launch ----

struct Machine {  // what the launch rule reads of a device
    int multiprocessors;
    int shared_per_multiprocessor;  // bytes: 233472 on sm_90 and sm_100, 167936 on sm_80
    int shared_per_block;           // bytes a block may opt in to: 232448, 166912
    int shared_reserved;            // bytes the driver keeps per resident block: 1024
    int max_cluster;                // 16 from sm_90 on (8 is portable), 1 before
};

struct ClusterPlan {
    int blocks;        // of a cluster; 0: no such plan, take the two-pass kernel
    int threads;       // of a block
    int capacity;      // vectors of a slice
    int shared_bytes;  // dynamic shared memory of a block
    int together;      // blocks that a multiprocessor's shared memory has room for
};

constexpr int kTogether = 3;  // blocks: while one decides and one waits for its loads, there is still one that moves

// A slice of 8 vectors a thread keeps 128 bytes per thread in flight.
GFT_HD int threads_for(int capacity, int most) {
    for (int threads = 2 * kWarp; threads < most; threads *= 2)
        if (capacity <= 8 * threads) return threads;
    return most;
}

// What a cluster of so many blocks takes, whether a device can place it or not.
GFT_HD ClusterPlan plan_of(const Machine& machine, int blocks, std::int64_t V, int element_bytes, int header_bytes) {
    const int capacity = slice_capacity(V, element_bytes, blocks);
    const std::int64_t bytes = header_bytes + std::int64_t{capacity} * kVectorBytes;
    if (bytes > machine.shared_per_block) return {};
    const auto together = static_cast<int>(machine.shared_per_multiprocessor / (bytes + machine.shared_reserved));
    // no more threads than registers, 56 each, let as many blocks be together as shared memory does, up to four
    const int threads = threads_for(capacity, together > kTogether ? 256 : kMaxThreads);
    return {blocks, threads, capacity, static_cast<int>(bytes), together};
}

// The cluster-size rule. clusters(plan): how many the device holds at once; 0: it cannot place one.
//
// 1. Clusters whose slices let three or four blocks live on a multiprocessor come before others.
// 2. Of those the one of which most are held at once: each holds a row, and the more rows are under way, the less any
//    of them has to hurry. A larger cluster has to hold more than 5 % more rows, for every block added to a cluster
//    adds a partner that all others wait for. No power of two is needed: on an H200 V = 151936 in bf16 runs in 79
//    clusters of 6 blocks (69 of 5, 62 of 4 or of 8), in fp32 in 37 of 9; V = 128256 in bf16 in 92 of 4.
// 3. Few rows (fewer blocks than multiprocessors): more blocks a row, as long as the cluster stays portable, with as
//    many threads as if each were alone on its multiprocessor, so that 16 rows of V = 151936 run on 128
//    multiprocessors.
template <class Clusters>
ClusterPlan cluster_plan(const Machine& machine, std::int64_t rows, std::int64_t V, int element_bytes, int header_bytes,
                         Clusters clusters) {
    ClusterPlan best{};
    int most = 0;
    const auto held = [&](const ClusterPlan& plan) { return plan.blocks == 0 ? 0 : clusters(plan); };
    for (int blocks = 1; blocks <= machine.max_cluster && best.together <= kTogether; ++blocks) {
        const ClusterPlan plan = plan_of(machine, blocks, V, element_bytes, header_bytes);
        const int rows_held = held(plan);
        const bool first_of_three = best.together < kTogether && plan.together >= kTogether;
        if (rows_held == 0 || (!first_of_three && 20 * rows_held <= 21 * most)) continue;
        best = plan;
        most = rows_held;
    }
    const auto spread = static_cast<int>(at_most(machine.multiprocessors / (rows > 0 ? rows : 1), std::int64_t{8}));
    if (best.blocks == 0 || spread <= best.blocks || spread > machine.max_cluster) return best;
    ClusterPlan wide = plan_of(machine, spread, V, element_bytes, header_bytes);
    wide.threads = threads_for(wide.capacity, kMaxThreads);
    return held(wide) > 0 ? wide : best;
}

}  // namespace gft::cuda
