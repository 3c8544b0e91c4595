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
constexpr int kMaxThreads = 512;  // with 64 registers each, two blocks fill a multiprocessor's 65536
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
};

// A slice of 8 vectors a thread keeps 128 bytes per thread in flight.
GFT_HD int threads_for(int capacity) {
    for (int threads = 2 * kWarp; threads < kMaxThreads; threads *= 2)
        if (capacity <= 8 * threads) return threads;
    return kMaxThreads;
}

// The cluster-size rule: candidate number `choice` in order of preference; blocks = 0 past the last.
//
// 1. The smallest cluster whose slices let two blocks live on a multiprocessor: while one of them waits for its loads,
//    or for the others of its cluster, the other one reads, reduces or writes. Small, because every block added to a
//    cluster adds a partner that all others wait for, and a cluster must fit into one GPC.
//    V = 151936 bf16: a row is 296.75 KiB; half a multiprocessor of sm_90 holds 113 KiB; 4 blocks of 74.25 KiB.
//    V = 32000 bf16: 62.5 KiB, 1 block. V = 262144 bf16: 8 of 64 KiB. V = 262144 fp32: 16 of 64 KiB.
// 2. If no cluster does (or the device cannot place it), one block a multiprocessor: V = 262144 fp32 in 8 of 128 KiB.
// 3. Few rows (fewer blocks than half the multiprocessors): twice the blocks, as long as the cluster stays portable,
//    so that 16 rows of V = 151936 run on 128 multiprocessors and not on 64.
GFT_HD ClusterPlan cluster_plan(const Machine& machine, std::int64_t rows, std::int64_t V, int element_bytes,
                                int header_bytes, int choice) {
    for (int resident = 2; resident >= 1; --resident) {
        const std::int64_t share = machine.shared_per_multiprocessor / resident - machine.shared_reserved;
        const std::int64_t budget = at_most(share, std::int64_t{machine.shared_per_block}) - header_bytes;
        for (int blocks = 1; blocks <= machine.max_cluster; blocks *= 2) {
            if (slice_capacity(V, element_bytes, blocks) * std::int64_t{kVectorBytes} > budget) continue;
            if (choice-- > 0) continue;
            while (blocks * 2 <= at_most(8, machine.max_cluster) && rows * blocks * 2 <= machine.multiprocessors)
                blocks *= 2;
            const int capacity = slice_capacity(V, element_bytes, blocks);
            return {blocks, threads_for(capacity), capacity, header_bytes + capacity * kVectorBytes};
        }
    }
    return {0, 0, 0, 0};
}

}  // namespace gft::cuda
