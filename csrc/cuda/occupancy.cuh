// What a device offers and how many clusters of a kernel it holds: asked of the driver once, then remembered. An answer
// is; a failure to answer is not, and the next call asks again.
#pragma once

#include <map>
#include <mutex>
#include <tuple>

#include "cuda/device.cuh"
#include "cuda/launch.h"
#include "cuda/plan.h"

namespace gft::cuda {
namespace {

constexpr Outcome kDone{0, nullptr, nullptr};

Outcome outcome(cudaError_t error, const char* doing) {
    if (error == cudaSuccess) return kDone;
    (void)cudaGetLastError();  // or the next call would report this error as its own
    return {static_cast<int>(error), doing, cudaGetErrorString(error)};
}

struct Device {
    Machine machine;
    int capability;  // 90 for 9.0
    cudaError_t error;
};

Device ask_device(int index) {
    Device device{};
    const auto read = [&](cudaDeviceAttr attribute) {
        int value = 0;
        const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, index);
        if (error != cudaSuccess) device.error = error;
        return value;
    };
    device.capability = 10 * read(cudaDevAttrComputeCapabilityMajor) + read(cudaDevAttrComputeCapabilityMinor);
    device.machine = {read(cudaDevAttrMultiProcessorCount), read(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
                      read(cudaDevAttrMaxSharedMemoryPerBlockOptin), read(cudaDevAttrReservedSharedMemoryPerBlock),
                      device.capability >= 90 ? kMaxCluster : 1};
    return device;
}

Device device_at(int index) {
    static std::mutex mutex;
    static std::map<int, Device> known;
    const std::lock_guard lock(mutex);
    if (const auto found = known.find(index); found != known.end()) return found->second;
    const Device device = ask_device(index);
    if (device.error == cudaSuccess) known.emplace(index, device);
    return device;
}

// Clusters of a shape that the device holds at once; 0: it cannot place one, or says why it does not tell.
struct Residents {
    int clusters;
    Outcome refused;
};

Residents resident_clusters(const void* kernel, const ClusterPlan& plan, int device) {
    static std::mutex mutex;
    static std::map<std::tuple<int, const void*, int, int, int>, Residents> known;
    const std::lock_guard lock(mutex);
    const auto key = std::make_tuple(device, kernel, plan.blocks, plan.threads, plan.shared_bytes);
    if (const auto found = known.find(key); found != known.end()) return found->second;

    const Machine machine = device_at(device).machine;
    cudaError_t error = cudaSuccess;
    const auto done = [&](cudaError_t result) {
        error = result;
        return result == cudaSuccess;
    };
    const auto set = [&](cudaFuncAttribute attribute, int value) {
        return done(cudaFuncSetAttribute(kernel, attribute, value));
    };
    bool fits = set(cudaFuncAttributeMaxDynamicSharedMemorySize, machine.shared_per_block) &&
                set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (plan.blocks > 8) fits = fits && set(cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    int clusters = 0;
    if (fits && machine.max_cluster > 1) {
        cudaLaunchAttribute cluster{};
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim = {static_cast<unsigned>(plan.blocks), 1, 1};
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(static_cast<unsigned>(plan.blocks));
        config.blockDim = dim3(static_cast<unsigned>(plan.threads));
        config.dynamicSmemBytes = static_cast<std::size_t>(plan.shared_bytes);
        config.attrs = &cluster;
        config.numAttrs = 1;
        fits = done(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
    } else if (fits) {
        fits = done(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&clusters, kernel, plan.threads,
                                                                  static_cast<std::size_t>(plan.shared_bytes)));
        clusters *= machine.multiprocessors;
    }
    if (fits) return known[key] = {clusters, kDone};
    const Residents none{0, outcome(error, "placing a cluster")};
    // A shape the device does not have is an answer too.
    if (error == cudaErrorInvalidValue || error == cudaErrorInvalidClusterSize) known[key] = none;
    return none;
}

}  // namespace
}  // namespace gft::cuda
