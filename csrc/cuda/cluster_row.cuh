// One read, one write: a cluster of blocks holds a row in shared memory from its statistics to its gradient.
//
// A thread copies, reads and refills only its own slots (i = thread, thread + threads, ...), so a slot needs no
// barrier: while the gradient of this row is written, each slot that has been read takes a vector of the cluster's next
// row. Thus loads and stores are in flight together in every block, and once more across the two blocks of a
// multiprocessor.
#pragma once

#include "cuda/row.cuh"

namespace gft::cuda {

struct ClusterShared {
    Softmax warps[kMaxWarps];
    Softmax blocks[2][kMaxCluster];  // written by all blocks of the cluster; the rows take turns
};
static_assert(sizeof(ClusterShared) % kVectorBytes == 0, "the slots behind it hold 16-byte vectors");

// The cluster's next row whose logits matter; the rows on the way there are cleared. Every block finds the same one.
template <class T>
GFT_DEVICE Part<T> next_part(const RowTask& task, long long row, long long step, int capacity, int rank, int blocks) {
    for (const long long rows = row_count(task.logits); row < rows; row += step) {
        const Part<T> part = open_part<T>(task, row, capacity, rank, blocks);
        if (part.read) return part;
        clear_part(task, part, rank == 0 && thread_index() == 0);
    }
    return no_part<T>(row);
}

// F1 over the slots of one quarter; the copies of the later quarters may still be on their way.
template <int kStage, bool kEntropy, class T>
GFT_DEVICE void observe_stage(Softmax& state, const uint4* slots, int stage, const Part<T>& part, const View& view) {
    await_copies<kStages - 1 - kStage>();
    const int stop = static_cast<int>(at_most((kStage + 1) * stage, part.vectors));
    for (int i = kStage * stage + thread_index(); i < stop; i += thread_count()) {
        float logits[kWidth<T>];
        unpack(slots[i], logits, T{});
        observe_others<kEntropy>(state, logits, i == target_vector(part), target_lane(part), view);
    }
}

// grid: any number of clusters of up to 16 blocks; threads: 64 to 512; shared: ClusterShared, then `capacity` vectors.
template <class T, bool kEntropy>
GFT_KERNEL(kMaxThreads, 2)
cluster_row(const RowTask task, const int capacity) {
    auto& shared = *reinterpret_cast<ClusterShared*>(shared_memory());
    auto* slots = reinterpret_cast<uint4*>(shared_memory() + sizeof(ClusterShared));
    const int rank = cluster_rank(), blocks = cluster_blocks();
    const int stage = static_cast<int>(ceil_div(capacity, kStages * thread_count())) * thread_count();
    const long long step = block_count() / blocks;

    cluster_barrier();  // all blocks run, so their shared memory may be written from here on
    Part<T> part = no_part<T>(block_index() / blocks - step);
    Verdict verdict{};
    for (int turn = 0;; turn ^= 1) {
        // Out with this row's gradient (there is none the first time), in with the next row's logits.
        const Part<T> next = next_part<T>(task, part.row + step, step, capacity, rank, blocks);
        const auto* logits = reinterpret_cast<const uint4*>(next.logits + next.first);
        for (int s = 0; s < kStages; ++s) {
            for (int i = s * stage + thread_index(); i < (s + 1) * stage && i < capacity; i += thread_count()) {
                if (i < part.vectors) shade_vector<kEntropy>(part, i, slots[i], verdict, task.view);
                if (i < next.vectors) copy_async(slots + i, logits + i);
            }
            commit_copies();
        }
        shade_edge<kEntropy>(part, verdict, task.view);
        if (!next.read)
            return;  // nobody reads this block's shared memory any more: the others passed the barrier below
        part = next;

        Softmax state = empty_softmax();
        if (part.edge >= 0) {
            float edge[1] = {part.edge_logit};
            observe_others<kEntropy>(state, edge, part.edge == part.target, 0, task.view);
        }
        observe_stage<0, kEntropy>(state, slots, stage, part, task.view);
        observe_stage<1, kEntropy>(state, slots, stage, part, task.view);
        observe_stage<2, kEntropy>(state, slots, stage, part, task.view);
        observe_stage<3, kEntropy>(state, slots, stage, part, task.view);

        // Each block tells all blocks. One barrier a row is enough: row n + 2 writes where row n was read, and no block
        // gets there before all have arrived at the barrier of row n + 1, behind their reading of row n.
        state = merge_warps<kEntropy>(state, shared.warps);
        if (thread_index() < blocks) *in_block(&shared.blocks[turn][rank], thread_index()) = state;
        cluster_barrier();
        Softmax others = shared.blocks[turn][0];
        for (int b = 1; b < blocks; ++b) others = merge_softmax<kEntropy>(others, shared.blocks[turn][b]);
        verdict = settle<kEntropy>(task, part, others, rank == 0 && thread_index() == 0);
    }
}

}  // namespace gft::cuda
