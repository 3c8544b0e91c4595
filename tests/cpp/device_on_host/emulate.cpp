// The CUDA backend's calls (csrc/cuda/launch.h) carried out on the host, with launch shapes chosen by the caller.
#include "cuda/cluster_row.cuh"
#include "cuda/credit.cuh"
#include "cuda/launch.h"
#include "cuda/scale.cuh"
#include "cuda/shard_row.cuh"
#include "cuda/two_pass_row.cuh"

using namespace gft;
using namespace gft::cuda;

struct Choice {
    int blocks;   // of a cluster; 0: two_pass_row
    int threads;  // of a block; of two_pass_row too, so that a short row still takes several turns
    int grid;     // clusters, or blocks of two_pass_row
    unsigned seed;
};

static bool simple(long long blocks, int threads, int shared, unsigned seed, const std::function<void()>& kernel) {
    return device_on_host::run_grid({blocks, threads, shared, 1}, seed, kernel);
}

template <class T, bool kEntropy>
static bool run_logits(const RowTask& task, Choice choice) {
    if (choice.blocks == 0)
        return simple(choice.grid, choice.threads, sizeof(TwoPassShared), choice.seed,
                      [&] { two_pass_row<T, kEntropy>(task); });
    const int capacity = slice_capacity(task.logits.V, sizeof(T), choice.blocks);
    const int shared = static_cast<int>(sizeof(ClusterShared<T>)) + capacity * kVectorBytes;
    return device_on_host::run_grid(
        {static_cast<long long>(choice.grid) * choice.blocks, choice.threads, shared, choice.blocks}, choice.seed,
        [&] { cluster_row<T, kEntropy>(task, capacity); });
}

extern "C" {

// Scratch arrays of R, R, S and S numbers come from the caller, filled with whatever the caller likes.
bool emulate_rows(const RowCall* call, const Choice* choice, float* weights_R, float* loss_R, float* advantages_S,
                  int* live_S) {
    const Credit& credit = call->credit;
    float items = NAN;
    const bool per_row = credit.reduction == Reduction::none;
    const CreditTask credits{credit, advantages_S, live_S, &items, call->out.advantages_R, weights_R};
    const auto blocks = [](std::int64_t n) { return ceil_div(n, 64); };
    bool ran = true;
    if (credit.rewards_S != nullptr)
        ran &= simple(blocks(credit.S * 32), 64, 0, choice->seed, [&] { advantages_of_rewards(credits); });
    if (credit.reduction == Reduction::sequence_mean) {
        std::memset(live_S, 0, static_cast<std::size_t>(credit.S) * sizeof(int));
        ran &= simple(blocks(ceil_div(credit.R, kRunRows)), 64, 0, choice->seed, [&] { count_live_rows(credits); });
    }
    const bool divides = credit.reduction == Reduction::token_mean || credit.reduction == Reduction::sequence_mean;
    if (divides && credit.num_items == nullptr)
        ran &= simple(1, 64, kMaxWarps * sizeof(int), choice->seed, [&] { count_items(credits); });
    ran &= simple(blocks(credit.R), 64, 0, choice->seed, [&] { credit_rows(credits); });

    const RowTask task{call->logits,
                       call->out.gradient,
                       credit,
                       call->out.advantages_R,
                       weights_R,
                       view_of(call->transform),
                       call->objective,
                       call->read_every_row,
                       per_row ? call->out.loss : loss_R,
                       call->out.log_probs_R,
                       call->out.coefficients_R,
                       call->out.entropy_R,
                       call->out.row_scale_R};
    ran &= with_types(call->logits.dtype, call->out.gradient.dtype, [&](auto type) {
        using T = decltype(type);
        const bool entropy = needs_entropy(task.objective, task.entropy_R);
        return entropy ? run_logits<T, true>(task, *choice) : run_logits<T, false>(task, *choice);
    });
    if (!per_row)
        ran &= simple(1, 64, kMaxWarps * sizeof(double), choice->seed,
                      [&] { sum_losses(task.loss_R, credit.R, call->out.loss); });
    return ran;
}

bool emulate_scale(const ScaleTask* task, const Choice* choice) {
    return with_types(task->gradient.dtype, task->scaled.dtype, [&](auto type) {
        return simple(choice->grid, choice->threads, 0, choice->seed, [&] { scale_row<decltype(type)>(*task); });
    });
}

bool emulate_observe_shard(const Shard* shard, const std::uint8_t* read_R, const ShardStatistics<float>* out,
                           const Choice* choice) {
    const ShardTask task{*shard, view_of(shard->transform), read_R, *out, {}, {}};
    return with_types(shard->logits.dtype, shard->logits.dtype, [&](auto type) {
        return simple(choice->grid, choice->threads, sizeof(TwoPassShared), choice->seed,
                      [&] { observe_shard_row<decltype(type)>(task); });
    });
}

bool emulate_shade_shard(const Shard* shard, const AgreedRows* agreed, const LogitRows* gradient,
                         const Choice* choice) {
    const ShardTask task{*shard, view_of(shard->transform), nullptr, {}, *agreed, *gradient};
    return with_types(shard->logits.dtype, gradient->dtype, [&](auto type) {
        using T = decltype(type);
        return simple(choice->grid, choice->threads, 0, choice->seed, [&] {
            agreed->tilt_R != nullptr ? shade_shard_row<T, true>(task) : shade_shard_row<T, false>(task);
        });
    });
}

// ---- plan.h ----

int header_bytes() { return sizeof(ClusterShared<Bf16>); }

// The rule with a device that holds as many clusters as its shared memory and registers have room for, if there is no
// `lost` (a cluster size of which it holds none).
ClusterPlan plan_cluster(const Machine* machine, std::int64_t rows, std::int64_t V, int element_bytes, int lost) {
    const auto clusters = [&](const ClusterPlan& plan) {
        const int together = at_most(plan.together, 65536 / (56 * plan.threads));
        return plan.blocks == lost ? 0 : machine->multiprocessors * together / plan.blocks;
    };
    return cluster_plan(*machine, rows, V, element_bytes, sizeof(ClusterShared<float>), clusters);
}

// How often each element of a row is looked after, by some thread of some block as vector or edge element: all 1.
void count_owners(std::uintptr_t address, std::int64_t V, int element_bytes, int blocks, int threads, int* owners) {
    const Split split = split_row(address, V, element_bytes);
    const int width = kVectorBytes / element_bytes, capacity = slice_capacity(V, element_bytes, blocks);
    for (int rank = 0; rank < blocks; ++rank) {
        const Slice slice = slice_of(split.vectors, capacity, rank);
        for (int j = 0; j < slice.count * width; ++j) owners[split.head + slice.first * width + j] += 1;
        for (int thread = 0; thread < threads; ++thread) {
            const int edge = edge_element(split, V, thread, rank == 0, rank == blocks - 1);
            if (edge >= 0) owners[edge] += 1;
        }
    }
}
}
