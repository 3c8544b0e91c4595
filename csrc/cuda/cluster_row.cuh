// One read, one write: a cluster of blocks holds a row in shared memory from its statistics to its gradient.
//
// A thread copies, reads and refills only its own slots (i = thread, thread + threads, ...), so a slot needs no
// barrier: while the gradient of this row is written, each slot that has been read takes a vector of the cluster's next
// row. Thus loads and stores are in flight together in every block, and once more across the blocks of a
// multiprocessor. What is done once a row is done by one warp of each block, which tells the others; meanwhile another
// one looks for the row after the next.
#pragma once

#include "cuda/row.cuh"

namespace gft::cuda {

// A row that is to come, as a block knows it.
template <class T>
struct Ahead {
    Part<T> part;
    Edge edges[2 * kEdge];  // of the first lanes
    int keeper;             // the thread with the slot of its target, if this block has it
};

// The row that is here, the next one, and the one after it that is being looked up: three, and four make % a mask.
constexpr int kAhead = 4;

// What a block shares beside its slots.
template <class T>
struct alignas(kVectorBytes) ClusterShared {
    uint4 letters[2][kMaxCluster];  // the state of each block of the cluster; the rows take turns
    Mailbox mailboxes[2];
    Softmax warps[kMaxWarps];
    Verdict verdict;  // on the row that is here
    Ahead<T> rows[kAhead];
};

// The cluster's first row from `row` on whose logits matter; a warp looks at 32 rows at once. Edges: each lane has its
// own.
template <class T>
GFT_DEVICE Part<T> next_part(const RowTask& task, long long row, long long step, int capacity) {
    const int lane = thread_index() % kWarp;
    for (const long long rows = row_count(task.logits); row < rows; row += kWarp * step) {
        const long long mine = row + lane * step;
        const int first = first_lane(mine < rows && row_matters(task, mine));
        if (first < kWarp) return open_part<T>(task, row + first * step, capacity, cluster_rank(), cluster_blocks());
    }
    return no_part<T>(row);
}

// By the first warp: the row from `row` on that comes next, for the block to read behind a barrier. Two rows ahead of
// its gradient nobody writes to it, in place neither.
template <class T>
GFT_DEVICE long long look_ahead(const RowTask& task, Ahead<T>& ahead, long long row, long long step, int capacity) {
    const Part<T> part = next_part<T>(task, row, step, capacity);
    if (thread_index() < 2 * kEdge) ahead.edges[thread_index()] = part.edge;
    if (thread_index() == 0) {
        ahead.part = part;
        ahead.keeper = target_vector(part) < part.vectors ? target_vector(part) % thread_count() : -1;
    }
    return part.row;
}

// What a row needs once, by one warp: the block's state to all blocks and theirs back, the verdict, the edges'
// gradient.
//
// One exchange a row is enough: row n + 2 sends where row n was read, and no block gets there before it has the letters
// of row n + 1 from all others, who send them behind their reading of row n.
template <bool kEntropy, class T>
GFT_DEVICE void lead(const RowTask& task, ClusterShared<T>& shared, int turn) {
    const int lane = thread_index() % kWarp, blocks = cluster_blocks();
    Part<T> part = shared.rows[turn % kAhead].part;
    part.edge = lane < 2 * kEdge ? shared.rows[turn % kAhead].edges[lane] : Edge{-1, 0.0f};
    Softmax state = lane < thread_count() / kWarp ? shared.warps[lane] : empty_softmax();
    if (part.edge.element >= 0) {
        float logit[1] = {part.edge.logit};
        observe_others<kEntropy>(state, logit, part.edge.element == part.target, 0, task.view);
    }
    state = merge_lanes<kEntropy>(state);
    if (blocks > 1) {
        uint4* const letters = shared.letters[turn % 2];
        Mailbox* const mailbox = shared.mailboxes + turn % 2;
        if (lane == 0) expect_letters(mailbox, blocks);
        if (lane < blocks) send_letter(letter_of(state), letters + cluster_rank(), mailbox, lane);
        await_letters(mailbox, turn / 2 % 2);
        state = merge_lanes<kEntropy>(lane < blocks ? state_of(letters[lane]) : empty_softmax());
    }
    const Verdict verdict = settle<kEntropy>(task, part, state, cluster_rank() == 0 && lane == 0);
    shade_edge<kEntropy>(part, verdict, task.view);
    if (lane == 0) shared.verdict = verdict;
}

// The rows on the way to the next one: nobody reads them.
template <class T>
GFT_DEVICE void clear_rows(const RowTask& task, long long row, long long stop, long long step, int capacity) {
    for (stop = at_most(stop, row_count(task.logits)); row < stop; row += step) {
        const auto part = locate_part<T>(task.logits, task.gradient, row, capacity, cluster_rank(), cluster_blocks());
        clear_part(task, part, cluster_rank() == 0 && thread_index() == 0);
    }
}

// visit(i) for this thread's i below `stop`, two at a time; the first i beyond.
template <class Visit>
GFT_DEVICE int visit_pairs(int i, int stop, Visit visit) {
    const int threads = thread_count();
#pragma unroll 1
    for (; i + threads < stop; i += 2 * threads) {
        visit(i);
        visit(i + threads);
    }
    if (i >= stop) return i;
    visit(i);
    return i + threads;
}

// Out with this row's gradient, in with the next row's logits.
template <bool kEntropy, class T>
GFT_DEVICE void turn_over(uint4* slots, int capacity, int stage, const Part<T>& part, const Part<T>& next,
                          const Verdict& verdict, const View& view) {
    const auto* from = reinterpret_cast<const uint4*>(next.logits + next.first);
    auto* to = reinterpret_cast<GradientVector<T>*>(part.gradient + part.first);
    const bool plain = part.aligned && !view.bent && !verdict.silent;
    const int both = plain ? at_most(part.vectors, next.vectors) : 0;
    int i = thread_index();
    for (int s = 1; s <= kStages; ++s) {
        const int stop = at_most(s * stage, capacity);
        i = visit_pairs(i, at_most(stop, both), [&](int k) {
            store_vector(to + k, shade_plain<kEntropy>(slots[k], verdict, view.slope, T{}));
            copy_async(slots + k, from + k);
        });
#pragma unroll 1
        for (; i < stop; i += thread_count()) {
            if (i < part.vectors) shade_vector<kEntropy>(part, i, slots[i], verdict, view);
            if (i < next.vectors) copy_async(slots + i, from + i);
        }
        commit_copies();
    }
}

// F1 over the slots of one stage; the copies of later ones may still be on their way. Logits that are not bent lose
// their target where they lie, so that the loop need not look for it.
template <int kStage, bool kEntropy, class T>
GFT_DEVICE void observe_stage(Softmax& state, uint4* slots, int stage, const Part<T>& part, int target_slot,
                              const View& view) {
    await_copies<kStages - 1 - kStage>();
    const int stop = at_most((kStage + 1) * stage, part.vectors);
    int i = kStage * stage + thread_index();
    if (view.bent) {
#pragma unroll 1
        for (; i < stop; i += thread_count()) {
            float logits[kWidth<T>];
            unpack(slots[i], logits, T{});
            observe_others<kEntropy>(state, logits, i == target_slot, target_lane(part), view);
        }
        return;
    }
    if (i <= target_slot && target_slot < stop) leave_out(slots[target_slot], target_lane(part), T{});
    visit_pairs(i, stop, [&](int k) { observe_vector<kEntropy>(state, slots[k], view.slope, T{}); });
}

// grid: any number of clusters of up to 16 blocks; threads: 64 to 384; shared: ClusterShared, then `capacity` vectors.
template <class T, bool kEntropy>
GFT_KERNEL(kMaxThreads, 3)
cluster_row(const RowTask task, const int capacity) {
    auto& shared = *reinterpret_cast<ClusterShared<T>*>(shared_memory());
    auto* slots = reinterpret_cast<uint4*>(shared_memory() + sizeof(ClusterShared<T>));
    const int stage = static_cast<int>(ceil_div(capacity, kStages * thread_count())) * thread_count();
    const int warp = thread_index() / kWarp;
    const long long step = block_count() / cluster_blocks();

    Part<T> part = no_part<T>(block_index() / cluster_blocks() - step);
    int target_slot = -1;  // of this thread
    if (thread_index() < 2) open_mailbox(shared.mailboxes + thread_index());
    if (thread_index() == 0) shared.verdict = {};
    if (warp == 0) {
        const long long first = look_ahead<T>(task, shared.rows[0], part.row + step, step, capacity);
        look_ahead<T>(task, shared.rows[1], first + step, step, capacity);
    }
    cluster_barrier();  // all blocks run, and their mailboxes are open
    for (int turn = 0;; ++turn) {
        const Ahead<T>& ahead = shared.rows[turn % kAhead];
        const Part<T> next = ahead.part;
        const Verdict verdict = shared.verdict;
        turn_over<kEntropy>(slots, capacity, stage, part, next, verdict, task.view);
        if (target_slot >= 0) write_target(part, verdict);
        clear_rows<T>(task, part.row + step, next.row, step, capacity);
        if (!next.read) return;  // nobody writes to this block any more: the letters of its last row have come
        part = next;
        target_slot = thread_index() == ahead.keeper ? target_vector(part) : -1;

        Softmax state = empty_softmax();
        observe_stage<0, kEntropy>(state, slots, stage, part, target_slot, task.view);
        observe_stage<1, kEntropy>(state, slots, stage, part, target_slot, task.view);
        observe_stage<2, kEntropy>(state, slots, stage, part, target_slot, task.view);
        observe_stage<3, kEntropy>(state, slots, stage, part, target_slot, task.view);
        state = merge_lanes<kEntropy>(state);
        if (thread_index() % kWarp == 0) shared.warps[warp] = state;
        block_barrier();
        if (warp == 0) {
            const long long row = shared.rows[(turn + 1) % kAhead].part.row;
            look_ahead<T>(task, shared.rows[(turn + 2) % kAhead], row + step, step, capacity);
        }
        if (warp == 1) lead<kEntropy>(task, shared, turn);
        block_barrier();
    }
}

}  // namespace gft::cuda
