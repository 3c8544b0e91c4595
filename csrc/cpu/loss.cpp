#include "cpu/loss.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "cpu/credit.h"
#include "cpu/elements.h"
#include "cpu/exact_row.h"
#include "cpu/parallel.h"
#include "gft/formulas.h"

namespace gft::cpu {
namespace {

void* row_of(const LogitRows& rows, std::int64_t r) {
    return static_cast<char*>(rows.data) + row_offset(rows, r) * element_size(rows.dtype);
}

// A row that does not count is cleared without being read: streaming stores do not fetch the lines they overwrite, and
// clear a long row in half the time of memset. A short row is better left in cache.
void write_zeros(const LogitRows& rows, std::int64_t r) {
    char* row = static_cast<char*>(row_of(rows, r));
    std::int64_t bytes = rows.V * element_size(rows.dtype);
#ifdef __SSE2__
    constexpr std::int64_t kLong = 1 << 15, kWidth = 16;
    if (bytes >= kLong) {
        const auto head = static_cast<std::int64_t>(-reinterpret_cast<std::uintptr_t>(row) % kWidth);
        std::memset(row, 0, static_cast<std::size_t>(head));
        row += head, bytes -= head;
        for (; bytes >= kWidth; row += kWidth, bytes -= kWidth)
            _mm_stream_si128(reinterpret_cast<__m128i*>(row), _mm_setzero_si128());
        _mm_sfence();
    }
#endif
    std::memset(row, 0, static_cast<std::size_t>(bytes));
}

// The passes that serve a transform.
RowKernels passes_for(const Transform& t, const Execution& execution) {
    if (in_float_range(t)) return *execution.kernels;
    return {"exact", exact_statistics, exact_gradient, execution.kernels->scale};
}

bool inside(const LogitRows& logits, std::int64_t column) { return column >= 0 && column < logits.V; }

// One row's softmax. The target stays out of the pass and joins in double: the loss keeps its relative precision as pi
// goes to 1, where the mass of all the others is what is left of it.
struct RowSoftmax {
    State<double> others, all;
    double gap;  // sum of (z - all.top)*e^(z - all.top); 0 unless asked for
};

RowSoftmax read_row(const LogitRows& logits, std::int64_t r, std::int64_t target, double target_logit,
                    const Transform& t, bool want_gap, decltype(RowKernels::statistics) statistics) {
    const RowStatistics beside =
        statistics(row_of(logits, r), logits.dtype, logits.V, target, target_logit, t, want_gap);
    RowSoftmax row{{beside.top, beside.mass}, {}, 0.0};
    row.all = observe(row.others, target_logit);
    row.gap =
        raise_gap(beside.gap, beside.mass, beside.top - row.all.top) + raise_gap(0.0, 1.0, target_logit - row.all.top);
    return row;
}

// Whether a token that is not the target has nearly all the mass. Its 1 swallows in float32 what the entropy, and the
// gradient of a bonus for it, are made of: 1e-2 to 1e-9 of the mass. Few rows are so, and those are read in doubles.
bool is_peaked_elsewhere(const RowSoftmax& row, double target_logit) {
    const double h = entropy(std::log(row.all.mass), row.gap / row.all.mass);
    return h < 0.2 && log_prob(target_logit, row.others) < -0.7;
}

// What the loss and F7 need of a row, in nats.
struct RowView {
    double target_logit;  // before the transform
    double log_pi;
    Normaliser normaliser;
    double entropy;
};

RowView view_row(const RowCall& call, std::int64_t r, const RowKernels& kernels) {
    const std::int64_t target = call.credit.targets_R[r];
    if (!inside(call.logits, target)) return {NAN, NAN, {NAN, NAN}, NAN};
    const double raw = read_element(row_of(call.logits, r), call.logits.dtype, target);
    const double logit = transformed(raw, call.transform);
    const bool want_entropy = needs_entropy(call.objective, call.out.entropy_R);
    const auto read = [&](auto statistics) {
        return read_row(call.logits, r, target, logit, call.transform, want_entropy, statistics);
    };
    RowSoftmax row = read(kernels.statistics);
    if (want_entropy && is_peaked_elsewhere(row, logit)) row = read(exact_statistics);
    const double log_mass = std::log(row.all.mass);
    return {raw,
            log_prob(logit, row.others),
            {row.all.top, log_mass},
            want_entropy ? entropy(log_mass, row.gap / row.all.mass) : 0.0};
}

// fp16: a weight of 1/N times pi = 1e-6 is below the smallest half, so the row is stored at kFp16Peak instead. Returns
// what backward multiplies the row by.
double split_scales(RowScales<double>& scales, const Transform& t) {
    const double size = row_size(scales.scale, scales.tilt, scales.entropy);
    if (size == 0.0) return 0.0;
    const double slope = std::fabs(t.logit_scale / t.temperature);
    scales.scale = scales.scale / size * kFp16Peak / slope;
    scales.tilt = scales.tilt / size * kFp16Peak / slope;
    return std::fmin(size * slope / kFp16Peak, FLT_MAX);  // beyond, a stored 0 would become 0 * inf
}

void write_gradient(const void* row, void* out, const LogitRows& logits, std::int64_t target, const RowView& view,
                    const RowScales<double>& scales, const Transform& t, const RowKernels& kernels) {
    kernels.gradient(row, out, logits.dtype, logits.V, view.normaliser, scales, t);
    if (!inside(logits, target)) return;
    const double slope = transform_slope(view.target_logit, t.logit_scale, t.softcap, t.temperature);
    const double in_nats =
        dlogit_target(view.log_pi, scales.scale) + dlogit_tilted(view.log_pi, 0.0, scales.tilt, scales.entropy);
    write_element(out, logits.dtype, target, in_nats * slope);
}

// Writes everything about row r; the row's loss in double is returned, for a sum that does not depend on threads.
double run_row(const RowCall& call, const RowCredit& credit, std::int64_t r, const RowKernels& kernels) {
    const RowResults& out = call.out;
    const bool read = credit.live && is_read(credit.advantage, credit.weight, call.objective, call.read_every_row);
    RowView view{};
    RowTerms<double> row{};
    RowScales<double> scales{};
    const std::int64_t target = call.credit.targets_R[r];
    if (read) {
        view = view_row(call, r, kernels);
        row = row_terms(view.log_pi, view.entropy, static_cast<double>(credit.advantage), r, call.objective);
        scales = {weighed(credit.weight, row.kappa), credit.weight * call.objective.entropy_coef, view.entropy};
    }
    out.log_probs_R[r] = static_cast<float>(view.log_pi);
    out.coefficients_R[r] = static_cast<float>(row.coefficient);
    out.advantages_R[r] = credit.advantage;
    if (out.entropy_R != nullptr) out.entropy_R[r] = static_cast<float>(view.entropy);
    if (out.row_scale_R != nullptr) out.row_scale_R[r] = static_cast<float>(split_scales(scales, call.transform));
    if (out.gradient.data != nullptr) {
        if (scales.scale == 0.0 && scales.tilt == 0.0) {
            write_zeros(out.gradient, r);
        } else {
            write_gradient(row_of(call.logits, r), row_of(out.gradient, r), call.logits, target, view, scales,
                           call.transform, kernels);
        }
    }
    return weighed(credit.weight, row.loss);
}

}  // namespace

void row_loss(const RowCall& call, const Execution& execution) {
    const std::vector<RowCredit> credit = credit_rows(call.credit);
    const RowKernels kernels = passes_for(call.transform, execution);
    std::vector<double> loss_R(credit.size());
    for_each_row(call.credit.R, call.logits.V, execution.threads,
                 [&](std::int64_t r) { loss_R[r] = run_row(call, credit[r], r, kernels); });
    double total = 0.0;
    for (std::size_t r = 0; r < loss_R.size(); ++r) {
        total += loss_R[r];
        if (call.credit.reduction == Reduction::none) call.out.loss[r] = static_cast<float>(loss_R[r]);
    }
    if (call.credit.reduction != Reduction::none) *call.out.loss = static_cast<float>(total);
}

bool all_within(const std::int64_t* values, std::int64_t count, std::int64_t stop) {
    bool all = true;
    for (std::int64_t i = 0; i < count; ++i) all &= values[i] >= 0 && values[i] < stop;
    return all;
}

bool all_finite(const float* values, std::int64_t count) {
    bool all = true;
    for (std::int64_t i = 0; i < count; ++i) all &= std::fabs(values[i]) <= FLT_MAX;
    return all;
}

void normalise_rewards(const Credit& credit, float* advantages_S) {
    const std::vector<float> advantages = group_advantages(credit);
    std::copy(advantages.begin(), advantages.end(), advantages_S);
}

void shard_statistics(const Shard& shard, const std::uint8_t* read_R, const ShardStatistics<double>& out,
                      const Execution& execution) {
    const LogitRows& logits = shard.logits;
    const Transform& t = shard.transform;
    const RowKernels kernels = passes_for(t, execution);
    for_each_row(row_count(logits), logits.V, execution.threads, [&](std::int64_t r) {
        const std::int64_t column = shard.columns_R[r];
        RowStatistics found{neg_inf<double>(), 0.0, 0.0};
        double target_logit = 0.0;
        if (read_R[r] != 0) {
            const bool here = inside(logits, column);
            if (here) target_logit = transformed(read_element(row_of(logits, r), logits.dtype, column), t);
            found = kernels.statistics(row_of(logits, r), logits.dtype, logits.V, here ? column : -1,
                                       here ? target_logit : neg_inf<double>(), t, out.gap_R != nullptr);
        }
        out.top_R[r] = found.top;
        out.mass_R[r] = found.mass;
        if (out.gap_R != nullptr) out.gap_R[r] = found.gap;
        out.target_logit_R[r] = target_logit;
    });
}

void shard_gradient(const Shard& shard, const AgreedRows& agreed, const LogitRows& out, const Execution& execution) {
    const LogitRows& logits = shard.logits;
    const RowKernels kernels = passes_for(shard.transform, execution);
    for_each_row(row_count(logits), logits.V, execution.threads, [&](std::int64_t r) {
        const bool tilted = agreed.tilt_R != nullptr;
        const RowScales<double> scales{agreed.scale_R[r], tilted ? agreed.tilt_R[r] : 0.0,
                                       tilted ? agreed.entropy_R[r] : 0.0};
        if (scales.scale == 0.0 && scales.tilt == 0.0) return write_zeros(out, r);
        const std::int64_t column = shard.columns_R[r];
        RowView view{0.0, agreed.log_pi_R[r], {agreed.top_R[r], agreed.log_mass_R[r]}, 0.0};
        if (inside(logits, column)) view.target_logit = read_element(row_of(logits, r), logits.dtype, column);
        write_gradient(row_of(logits, r), row_of(out, r), logits, column, view, scales, shard.transform, kernels);
    });
}

void scale_rows(const LogitRows& gradient, const LogitRows& out, const float* row_scale_R, const float* upstream,
                bool upstream_per_row, const Execution& execution) {
    for_each_row(row_count(gradient), gradient.V, execution.threads, [&](std::int64_t r) {
        const float given = upstream[upstream_per_row ? r : 0];
        const float factor = row_scale_R == nullptr ? given : row_scale_R[r] * given;
        if (factor == 1.0f && gradient.data == out.data) return;
        execution.kernels->scale(row_of(gradient, r), row_of(out, r), gradient.dtype, out.dtype, gradient.V, factor);
    });
}

}  // namespace gft::cpu
