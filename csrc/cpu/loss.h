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

// A vocabulary shard's part of each row's softmax, in nats of the transformed logits; targets count from the shard's
// first column and may lie outside it. A row that is not live is not read and gets the neutral (-inf, 0, 0, -inf).
struct ShardStatistics {
    double* top_R;
    double* mass_R;          // sum of e^(z - top)
    double* gap_R;           // sum of (z - top)*e^(z - top); null: not wanted
    double* target_logit_R;  // -inf where the target lies elsewhere
};
void row_statistics(const LogitRows& logits, const std::int64_t* targets_R, const std::uint8_t* live_R,
                    const Transform& transform, const ShardStatistics& out, const Execution& execution);

// F7 on a shard, given what all shards agreed on. A row of scale 0 is not read; its gradient is exactly 0.
struct ShardGradient {
    const std::int64_t* targets_R;
    const double* top_R;        // the softmax over the whole vocabulary:
    const double* mass_R;       // sum of e^(z - top)
    const double* log_probs_R;  // log pi of the target
    const float* scale_R;       // weight * kappa
};
void row_gradient(const LogitRows& logits, const LogitRows& out, const ShardGradient& given, const Transform& transform,
                  const Execution& execution);

// out = gradient * row_scale * upstream: one product in float32, rounded once. row_scale_R may be null; upstream holds
// one number, or one per row.
void scale_rows(const LogitRows& gradient, const LogitRows& out, const float* row_scale_R, const float* upstream,
                bool upstream_per_row, const Execution& execution);

}  // namespace gft::cpu
