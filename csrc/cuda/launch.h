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
};

// What went wrong, or code 0. The texts are static.
struct Outcome {
    int code;             // cudaError_t
    const char* doing;    // "launching two_pass_row"
    const char* message;  // the runtime's own words
};

// Why no kernel can run here at all ("no CUDA driver ..."), or null.
const char* absent();

// Why this device cannot run the kernels, or null.
const char* unfit(int device);

// Bytes of scratch memory, aligned to 256, that run_rows needs for this call. Its contents do not matter.
std::size_t workspace_bytes(const RowCall& call);

// Loss, statistics and, if call.out.gradient.data is set, the gradient.
Outcome run_rows(const RowCall& call, void* workspace, Place place);

// scaled = gradient * row_scale_R * upstream; upstream is () or R long (per_row); `scaled` may be `gradient`.
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
