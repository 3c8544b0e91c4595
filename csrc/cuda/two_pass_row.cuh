// Two reads, one write: a block reads a row for its statistics and again for its gradient. For GPUs before sm_90, rows
// that no cluster can hold, and statistics alone (one read).
//
// 1024 threads of 64 registers fill a multiprocessor, so that one row is open on each: 132 rows of V = 151936 in bf16
// are 39 MiB and stay in the 50 MiB L2 cache of an H100 until the second read, which starts at the end, where the
// first left off.
#pragma once

#include "cuda/row.cuh"

namespace gft::cuda {

constexpr int kTwoPassThreads = 1024;
constexpr int kOnePassThreads = 512;
constexpr int kLoads = 3;  // 16-byte loads a thread has under way: 48 KiB a multiprocessor; a fourth spills on sm_100

struct TwoPassShared {
    Softmax warps[kMaxWarps];
    Softmax row;
};

// Calls visit(i, vector i) for this thread's vectors, from the last to the first if kBackwards. kTogether, by the whole
// block: no visit before all threads have read all vectors of this turn.
template <bool kBackwards, bool kTogether = false, class T, class Visit>
GFT_DEVICE void for_each_vector(const Part<T>& part, Visit visit) {
    const auto* vectors = reinterpret_cast<const uint4*>(part.logits + part.first);
    const int first = thread_index();
    for (int start = first; start < part.vectors + (kTogether ? first : 0); start += kLoads * thread_count()) {
        uint4 loaded[kLoads];
#pragma unroll
        for (int k = 0; k < kLoads; ++k) {
            const int i = start + k * thread_count();
            if (i < part.vectors) loaded[k] = load_vector(vectors + (kBackwards ? part.vectors - 1 - i : i));
        }
        if (kTogether) block_barrier();
#pragma unroll
        for (int k = 0; k < kLoads; ++k) {
            const int i = start + k * thread_count();
            if (i < part.vectors) visit(kBackwards ? part.vectors - 1 - i : i, loaded[k]);
        }
    }
}

// F1 and F2 over everything but the target of a row, in every thread of the block.
template <bool kEntropy, class T>
GFT_DEVICE Softmax observe_row(const Part<T>& part, const View& view, TwoPassShared& shared) {
    Softmax state = empty_softmax();
    for_each_vector<false>(part, [&](int i, uint4 vector) {
        if (!view.bent && i != target_vector(part)) return observe_vector<kEntropy>(state, vector, view.slope, T{});
        float logits[kWidth<T>];
        unpack(vector, logits, T{});
        observe_others<kEntropy>(state, logits, i == target_vector(part), target_lane(part), view);
    });
    if (part.edge.element >= 0) {
        float edge[1] = {part.edge.logit};
        observe_others<kEntropy>(state, edge, part.edge.element == part.target, 0, view);
    }
    state = merge_warps<kEntropy>(state, shared.warps);
    if (thread_index() == 0) shared.row = state;
    block_barrier();
    return shared.row;
}

// A gradient of half the logits' size may lie over them: then the gradient of vector i is written over vector i / 2. So
// it goes forwards, and as the block has read up to its turn's last vector before it writes the first, what is
// overwritten has been read; the edges, in registers for long, come behind the last turn.
template <bool kEntropy, class T>
GFT_DEVICE void shade_row(const Part<T>& part, const Verdict& verdict, const View& view) {
    constexpr bool kRounded = sizeof(GradientOf<T>) < sizeof(T);
    auto* to = reinterpret_cast<GradientVector<T>*>(part.gradient + part.first);
    const bool plain = part.aligned && !view.bent && !verdict.silent;
    for_each_vector<!kRounded, kRounded>(part, [&](int i, uint4 vector) {
        if (plain)
            store_vector(to + i, shade_plain<kEntropy>(vector, verdict, view.slope, T{}));
        else
            shade_vector<kEntropy>(part, i, vector, verdict, view);
        if (i == target_vector(part)) write_target(part, verdict);
    });
    shade_edge<kEntropy>(part, verdict, view);
}

// grid: a block a row, or fewer; threads: 1024, or 512 without a gradient: then a row is read once, and two on each
// multiprocessor keep it busy while one of them merges.
template <class T, bool kEntropy>
GFT_KERNEL(kTwoPassThreads, 1)
two_pass_row(const RowTask task) {
    auto& shared = *reinterpret_cast<TwoPassShared*>(shared_memory());
    const int whole_row = slice_capacity(task.logits.V, sizeof(T), 1);
    for (long long row = block_index(); row < row_count(task.logits); row += block_count()) {
        const Part<T> part = open_part<T>(task, row, whole_row, 0, 1);
        if (!part.read) {
            clear_part(task, part, thread_index() == 0);
            continue;
        }
        const Softmax others = observe_row<kEntropy>(part, task.view, shared);
        const Verdict verdict = settle<kEntropy>(task, part, others, thread_index() == 0);
        if (part.gradient != nullptr) shade_row<kEntropy>(part, verdict, task.view);
    }
}

}  // namespace gft::cuda
