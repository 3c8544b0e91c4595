// The CUDA backend's plain interface: what python_api may call. No CUDA header, no torch, no exceptions.
//
// Pointers in the arguments are device pointers of `place.device`; work is queued on `place.stream` and nothing waits:
// no allocation, no synchronisation, no reading back, so every call may be captured into a CUDA graph.
#pragma once

#include <cstddef>

#include "gft/args.h"

namespace gft::cuda {

struct Place {
    int device;
    void* stream;  // cudaStream_t
    int cluster;   // blocks of a cluster, for tests; 0: the plan's
    int clusters;  // at most so many at once, for tests; 0: as many as the device holds
};

// What went wrong, or code 0. The texts are static.
struct Outcome {
    int code;             // cudaError_t
    const char* doing;    // "launching two_pass_row"
    const char* message;  // the runtime's own words
};

// Why no kernel can run here at all ("no CUDA driver ..."), or null.
const char* absent();

// 13000 for CUDA 13.0; 0: there is none.
struct Versions {
    int runtime;  // linked into this module
    int driver;   // the newest runtime that the driver here serves
};
Versions versions();

// Why this device cannot run the kernels, or null.
const char* unfit(int device);

// What a plan depends on.
struct RowShape {
    std::int64_t rows, V;
    Dtype dtype;
    bool gradient;
    Dtype gradient_dtype;  // where there is one
    bool entropy;
};

// How run_rows launches the kernel that reads the logits.
struct LaunchPlan {
    const char* kernel;  // cluster_row, or two_pass_row
    int cluster;         // blocks that share a row
    int threads;         // of a block
    int shared_bytes;    // dynamic, of a block
    int capacity;        // vectors of a block's slice; 0: two_pass_row
    int resident;        // clusters the device holds at once; 0: two_pass_row
    long long grid;      // blocks
    Outcome refused;     // what the device last said to a shape that was tried before this one; code 0: nothing
};
LaunchPlan plan_rows(const RowShape& shape, Place place);

// Bytes of scratch memory, aligned to 256, that run_rows needs for this call. Its contents do not matter.
std::size_t workspace_bytes(const RowCall& call);

// Loss, statistics and, if call.out.gradient.data is set, the gradient.
Outcome run_rows(const RowCall& call, void* workspace, Place place);

// scaled = gradient * row_scale_R * upstream; upstream is () or R long (per_row); `scaled` may be `gradient`, and of a
// float32 gradient it may be of any type.
Outcome scale_rows(const LogitRows& gradient, const LogitRows& scaled, const float* row_scale_R, const float* upstream,
                   bool per_row, Place place);

// ---- one vocabulary over several devices: each holds a range of columns of every row ----

// F1 over the columns here. A row that read_R leaves out gets the neutral state (-inf, 0).
Outcome shard_statistics(const Shard& shard, const std::uint8_t* read_R, const ShardStatistics<float>& out,
                         Place place);

// F7 over the columns here; `out.data` may be the logits': in place. A row whose scale and tilt are 0 is not read; its
// gradient is exactly 0.
Outcome shard_gradient(const Shard& shard, const AgreedRows& agreed, const LogitRows& out, Place place);

}  // namespace gft::cuda
