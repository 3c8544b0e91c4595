// Which kernels a call takes, with what shape, and their launches. See launch.h.
#include "cuda/launch.h"

#include "cuda/cluster_row.cuh"
#include "cuda/credit.cuh"
#include "cuda/occupancy.cuh"
#include "cuda/scale.cuh"
#include "cuda/shard_row.cuh"
#include "cuda/two_pass_row.cuh"

namespace gft::cuda {
namespace {

// ---- launches ----

struct Shape {
    long long grid;  // blocks
    int threads;
    int shared_bytes;
    int cluster;  // blocks of a cluster
};

template <class... Parameters, class... Arguments>
Outcome launch(const char* doing, void (*kernel)(Parameters...), Shape shape, Place place, Arguments... arguments) {
    if (shape.grid == 0) return kDone;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(shape.grid));
    config.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config.dynamicSmemBytes = static_cast<std::size_t>(shape.shared_bytes);
    config.stream = static_cast<cudaStream_t>(place.stream);
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
    config.attrs = &cluster;
    config.numAttrs = shape.cluster > 1 ? 1 : 0;
    return outcome(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), doing);
}

// x is the only grid dimension that reaches it, and the kernels stride over what is beyond.
constexpr std::int64_t kMaxGrid = 0x7fffffff;

Shape block_per_row(std::int64_t rows, int threads, int shared_bytes) {
    return {at_most(rows, kMaxGrid), threads, shared_bytes, 1};
}

// With a gradient: the cluster plan, on as many clusters as fit at once (each walks over its rows, loading the next
// while it writes this one); for statistics, and where the device can place no cluster, two_pass_row.
template <class T, bool kEntropy>
LaunchPlan plan_logits(const RowShape& shape, Place place) {
    const Device device = device_at(place.device);
    LaunchPlan plan{"two_pass_row",
                    1,
                    shape.gradient ? kTwoPassThreads : kOnePassThreads,
                    sizeof(TwoPassShared),
                    0,
                    0,
                    at_most(shape.rows, kMaxGrid),
                    outcome(device.error, "asking what the device has")};
    if (!shape.gradient) return plan;
    const auto residents = [&](const ClusterPlan& cluster) {
        const auto* kernel = reinterpret_cast<const void*>(cluster_row<T, kEntropy>);
        const Residents found = resident_clusters(kernel, cluster, place.device);
        if (found.refused.code != 0) plan.refused = found.refused;
        return found.clusters;
    };
    constexpr int header = sizeof(ClusterShared<T>);
    const ClusterPlan cluster = place.cluster != 0
                                    ? plan_of(device.machine, place.cluster, shape.V, sizeof(T), header)
                                    : cluster_plan(device.machine, shape.rows, shape.V, sizeof(T), header, residents);
    const int resident = cluster.capacity == 0 ? 0 : residents(cluster);  // a row shorter than a vector has none
    if (resident == 0) return plan;
    const int most = place.clusters != 0 ? at_most(place.clusters, resident) : resident;
    return {"cluster_row",
            cluster.blocks,
            cluster.threads,
            cluster.shared_bytes,
            cluster.capacity,
            resident,
            at_most(shape.rows, std::int64_t{most}) * cluster.blocks,
            plan.refused};
}

template <class T, bool kEntropy>
Outcome run_logits(const RowTask& task, Place place) {
    const RowShape asked{row_count(task.logits),        task.logits.V,       task.logits.dtype,
                         task.gradient.data != nullptr, task.gradient.dtype, kEntropy};
    const LaunchPlan plan = plan_logits<T, kEntropy>(asked, place);
    const Shape shape{plan.grid, plan.threads, plan.shared_bytes, plan.cluster};
    if (plan.capacity == 0) return launch("launching two_pass_row", two_pass_row<T, kEntropy>, shape, place, task);
    return launch("launching cluster_row", cluster_row<T, kEntropy>, shape, place, task, plan.capacity);
}

// ---- scratch memory ----

struct Workspace {
    float *weights_R, *loss_R, *advantages_S, *items;
    int* live_S;
    std::size_t bytes;
};

bool counts_responses(const Credit& credit) { return credit.reduction == Reduction::sequence_mean; }

Workspace carve(const RowCall& call, void* base) {
    Workspace space{};
    const auto take = [&](std::int64_t numbers) {
        void* here = static_cast<char*>(base) + space.bytes;
        space.bytes += static_cast<std::size_t>(ceil_div(numbers * 4, 256) * 256);
        return here;
    };
    const Credit& credit = call.credit;
    space.items = static_cast<float*>(take(1));
    space.weights_R = static_cast<float*>(take(credit.R));
    space.loss_R = static_cast<float*>(take(credit.reduction == Reduction::none ? 0 : credit.R));
    space.advantages_S = static_cast<float*>(take(credit.rewards_S != nullptr ? credit.S : 0));
    space.live_S = static_cast<int*>(take(counts_responses(credit) ? credit.S : 0));
    return space;
}

Outcome assign_credit(const CreditTask& task, Place place) {
    const Credit& credit = task.credit;
    const auto blocks_for = [](std::int64_t threads) {
        return Shape{ceil_div(threads, kCreditThreads), kCreditThreads, 0, 1};
    };
    Outcome done = kDone;
    if (credit.rewards_S != nullptr)
        done =
            launch("launching advantages_of_rewards", advantages_of_rewards, blocks_for(credit.S * kWarp), place, task);
    if (done.code == 0 && counts_responses(credit)) {
        done = outcome(cudaMemsetAsync(task.live_S, 0, static_cast<std::size_t>(credit.S) * sizeof(int),
                                       static_cast<cudaStream_t>(place.stream)),
                       "clearing the counters");
        if (done.code == 0)
            done = launch("launching count_live_rows", count_live_rows, blocks_for(ceil_div(credit.R, kRunRows)), place,
                          task);
    }
    const bool divides = credit.reduction == Reduction::token_mean || credit.reduction == Reduction::sequence_mean;
    if (done.code == 0 && divides && credit.num_items == nullptr)
        done = launch("launching count_items", count_items, {1, kSumThreads, kMaxWarps * sizeof(int), 1}, place, task);
    if (done.code != 0) return done;
    return launch("launching credit_rows", credit_rows, blocks_for(credit.R), place, task);
}

}  // namespace

const char* absent() {
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess) return outcome(error, "").message;
    return devices > 0 ? nullptr : "no CUDA device is visible";
}

const char* unfit(int device) {
    const Device known = device_at(device);
    if (known.error != cudaSuccess) return cudaGetErrorString(known.error);
    return known.capability >= 80 ? nullptr : "the kernels need compute capability 8.0 or later";
}

Versions versions() {
    Versions found{};
    (void)cudaRuntimeGetVersion(&found.runtime);
    if (cudaDriverGetVersion(&found.driver) != cudaSuccess) found.driver = 0;
    return found;
}

LaunchPlan plan_rows(const RowShape& shape, Place place) {
    return with_types(shape.dtype, shape.gradient_dtype, [&](auto type) {
        using T = decltype(type);
        return shape.entropy ? plan_logits<T, true>(shape, place) : plan_logits<T, false>(shape, place);
    });
}

std::size_t workspace_bytes(const RowCall& call) { return carve(call, nullptr).bytes; }

Outcome run_rows(const RowCall& call, void* workspace, Place place) {
    Outcome done = outcome(cudaSetDevice(place.device), "choosing the device");
    if (done.code != 0) return done;
    const Workspace space = carve(call, workspace);
    const bool per_row = call.credit.reduction == Reduction::none;
    const CreditTask credit{call.credit, space.advantages_S,    space.live_S,
                            space.items, call.out.advantages_R, space.weights_R};
    done = assign_credit(credit, place);
    if (done.code != 0) return done;

    RowTask task{};
    task.logits = call.logits;
    task.gradient = call.out.gradient;
    task.credit = call.credit;
    task.advantages_R = call.out.advantages_R;
    task.weights_R = space.weights_R;
    task.view = view_of(call.transform);
    task.objective = call.objective;
    task.read_every_row = call.read_every_row;
    task.loss_R = per_row ? call.out.loss : space.loss_R;
    task.log_probs_R = call.out.log_probs_R;
    task.coefficients_R = call.out.coefficients_R;
    task.entropy_R = call.out.entropy_R;
    task.row_scale_R = call.out.row_scale_R;
    done = with_types(call.logits.dtype, call.out.gradient.dtype, [&](auto type) {
        using T = decltype(type);
        const bool entropy = needs_entropy(task.objective, task.entropy_R);
        return entropy ? run_logits<T, true>(task, place) : run_logits<T, false>(task, place);
    });
    if (done.code != 0 || per_row) return done;
    return launch("launching sum_losses", sum_losses, {1, kSumThreads, kMaxWarps * sizeof(double), 1}, place,
                  task.loss_R, call.credit.R, call.out.loss);
}

Outcome scale_rows(const LogitRows& gradient, const LogitRows& scaled, const float* row_scale_R, const float* upstream,
                   bool per_row, Place place) {
    const Outcome chosen = outcome(cudaSetDevice(place.device), "choosing the device");
    if (chosen.code != 0) return chosen;
    // Few blocks that walk over many rows: with an upstream gradient of 1 in place, the launch is all that is paid. The
    // rows of a head's gradient are short: smaller blocks, and as many more of them, hold as many bytes in flight.
    const int vectors = slice_capacity(gradient.V, gradient.dtype == Dtype::f32 ? 4 : 2, 1);
    const int threads = threads_for(vectors, kScaleThreads);
    const std::int64_t resident = 2 * (kScaleThreads / threads) * device_at(place.device).machine.multiprocessors;
    const Shape shape{at_most(row_count(gradient), 2 * resident), threads, 0, 1};
    const ScaleTask task{gradient, scaled, row_scale_R, upstream, per_row};
    return with_types(gradient.dtype, scaled.dtype, [&](auto type) {
        return launch("launching scale_row", scale_row<decltype(type)>, shape, place, task);
    });
}

Outcome shard_statistics(const Shard& shard, const std::uint8_t* read_R, const ShardStatistics<float>& out,
                         Place place) {
    const Outcome chosen = outcome(cudaSetDevice(place.device), "choosing the device");
    if (chosen.code != 0) return chosen;
    const ShardTask task{shard, view_of(shard.transform), read_R, out, {}, {}};
    return with_types(shard.logits.dtype, shard.logits.dtype, [&](auto type) {
        return launch("launching observe_shard_row", observe_shard_row<decltype(type)>,
                      block_per_row(row_count(shard.logits), kOnePassThreads, sizeof(TwoPassShared)), place, task);
    });
}

Outcome shard_gradient(const Shard& shard, const AgreedRows& agreed, const LogitRows& out, Place place) {
    const Outcome chosen = outcome(cudaSetDevice(place.device), "choosing the device");
    if (chosen.code != 0) return chosen;
    const ShardTask task{shard, view_of(shard.transform), nullptr, {}, agreed, out};
    return with_types(shard.logits.dtype, out.dtype, [&](auto type) {
        using T = decltype(type);
        return launch("launching shade_shard_row",
                      agreed.tilt_R != nullptr ? shade_shard_row<T, true> : shade_shard_row<T, false>,
                      block_per_row(row_count(shard.logits), kTwoPassThreads, 0), place, task);
    });
}

}  // namespace gft::cuda
