// The CPU's entry points. Every pointer in their arguments is a host pointer.
#pragma once

#include "cpu/instruction_sets.h"
#include "gft/args.h"

namespace gft::cpu {

// How a call is carried out; no result depends on the number of threads.
struct Execution {
    const RowKernels* kernels;
    int threads;
};

// Loss, statistics and, if wanted, the gradient of a call. A row whose target or response id is out of range is NaN.
void row_loss(const RowCall& call, const Execution& execution);

// Whether a call's numbers can be taken as they are: all ids in [0, stop), no number infinite or NaN.
bool all_within(const std::int64_t* values, std::int64_t count, std::int64_t stop);
bool all_finite(const float* values, std::int64_t count);

// F5: an advantage for each of the call's rewards.
void normalise_rewards(const Credit& credit, float* advantages_S);

// F1 over a vocabulary shard. A row that read_R leaves out gets the neutral state (-inf, 0).
void shard_statistics(const Shard& shard, const std::uint8_t* read_R, const ShardStatistics<double>& out,
                      const Execution& execution);

// F7 over a vocabulary shard. A row whose scale and tilt are 0 is not read; its gradient is exactly 0.
void shard_gradient(const Shard& shard, const AgreedRows& agreed, const LogitRows& out, const Execution& execution);

// out = gradient * row_scale * upstream: one product in float32, rounded once, of a float32 gradient to any type.
// row_scale_R may be null; upstream holds one number, or one per row.
void scale_rows(const LogitRows& gradient, const LogitRows& out, const float* row_scale_R, const float* upstream,
                bool upstream_per_row, const Execution& execution);

}  // namespace gft::cpu
