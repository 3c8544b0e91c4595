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

// A row's softmax over the columns here, without its target; nats, R long.
struct ShardStatistics {
    float* top_R;
    float* mass_R;          // in units of e^top
    float* gap_R;           // sum (z - top) * e^(z - top); null: no entropy wanted
    float* target_logit_R;  // transformed; 0 where the target is on another device
};

// What the devices agreed on, R long: the whole row's log pi, top, log mass and RowScales.
struct ShardGradient {
    const float* log_pi_R;
    const float* top_R;
    const float* log_mass_R;
    const float* scale_R;
    const float* tilt_R;     // null: no entropy bonus; where it and scale are 0 the row is not read, its gradient is 0
    const float* entropy_R;  // null with tilt_R
};

// columns_R: the target's column on this device, or anything outside [0, V). Rows with read_R false keep the neutral
// state (-inf, 0).
Outcome observe_shard(const LogitRows& logits, const std::int64_t* columns_R, const std::uint8_t* read_R,
                      const Transform& transform, const ShardStatistics& out, Place place);

// F7 here; `gradient.data` may be `logits.data`: in place.
Outcome shade_shard(const LogitRows& logits, const std::int64_t* columns_R, const ShardGradient& agreed,
                    const Transform& transform, const LogitRows& gradient, Place place);

}  // namespace gft::cuda
