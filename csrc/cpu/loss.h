// The CPU's entry points. Every pointer in their arguments is a host pointer.
#pragma once

#include "cpu/credit.h"
#include "cpu/row_kernels.h"
#include "gft/args.h"

namespace gft::cpu {

// How a call is carried out; no result depends on the number of threads.
struct Execution {
    const RowKernels* kernels;
    int threads;
};

// Loss, statistics and, if wanted, the gradient of a call. On a fault nothing has been written.
Fault row_loss(const RowCall& call, const Execution& execution);

// A vocabulary shard's part of each row, in nats of the transformed logits, the target left out.
struct ShardStatistics {
    double* top_R;
    double* mass_R;          // sum of e^(z - top)
    double* gap_R;           // sum of (z - top)*e^(z - top); null: not wanted
    double* target_logit_R;  // 0 where the target lies in another shard
};
// columns_R: the target's column in this shard, or anything outside [0, V). A row that read_R leaves out gets the
// neutral state (-inf, 0).
void shard_statistics(const LogitRows& logits, const std::int64_t* columns_R, const std::uint8_t* read_R,
                      const Transform& transform, const ShardStatistics& out, const Execution& execution);

// What all shards agreed on about each row.
struct WholeRows {
    const float* log_pi_R;
    const float* top_R;
    const float* log_mass_R;
    const float *scale_R, *tilt_R, *entropy_R;  // RowScales
};
// F7 on a shard. A row whose scale and tilt are 0 is not read; its gradient is exactly 0.
void shard_gradient(const LogitRows& logits, const LogitRows& out, const std::int64_t* columns_R,
                    const WholeRows& given, const Transform& transform, const Execution& execution);

// out = gradient * row_scale * upstream: one product in float32, rounded once. row_scale_R may be null; upstream holds
// one number, or one per row.
void scale_rows(const LogitRows& gradient, const LogitRows& out, const float* row_scale_R, const float* upstream,
                bool upstream_per_row, const Execution& execution);

}  // namespace gft::cpu
