// A vocabulary over several devices: the two halves of two_pass_row as kernels of their own, with the devices' exchange
// between them. Their numbers cross in nats; a float32 top in nats is not the top in base 2 these kernels count from,
// so both kernels carry the difference of the two anchors (formed in doubles, once a row) over to the masses.
#pragma once

#include "cuda/two_pass_row.cuh"

namespace gft::cuda {

struct ShardTask {
    Shard shard;
    View view;
    const std::uint8_t* read_R;         // of observe_shard_row
    ShardStatistics<float> statistics;  // of observe_shard_row
    AgreedRows agreed;                  // of shade_shard_row
    LogitRows gradient;                 // of shade_shard_row
};

constexpr double kLog2EDouble = 1.4426950408889634;

template <class T>
GFT_DEVICE Part<T> open_shard(const ShardTask& task, long long row) {
    const LogitRows& logits = task.shard.logits;
    Part<T> part = locate_part<T>(logits, task.gradient, row, slice_capacity(logits.V, sizeof(T), 1), 0, 1);
    const std::int64_t column = task.shard.columns_R[row];
    if (column >= 0 && column < logits.V) part.target = static_cast<int>(column);
    return part;
}

template <class T>
GFT_KERNEL(kTwoPassThreads, 1)
observe_shard_row(const ShardTask task) {
    auto& shared = *reinterpret_cast<TwoPassShared*>(shared_memory());
    const ShardStatistics<float>& out = task.statistics;
    for (long long row = block_index(); row < row_count(task.shard.logits); row += block_count()) {
        Part<T> part = open_shard<T>(task, row);
        const bool read = task.read_R[row] != 0;
        Softmax others = empty_softmax();
        if (read) {
            if (part.edge.element >= 0) part.edge.logit = widen(part.logits[part.edge.element]);
            others = observe_row<true>(part, task.view, shared);
        }
        if (thread_index() != 0) continue;
        const bool empty = others.top == -FLT_MAX;
        const float top = empty ? -INFINITY : static_cast<float>(others.top / kLog2EDouble);
        const double raised = empty ? 0.0 : others.top - top * kLog2EDouble;  // old anchor - new anchor, base 2
        const float share = exp2f(static_cast<float>(raised));
        out.top_R[row] = top;
        out.mass_R[row] = others.mass * share;
        if (out.gap_R != nullptr)
            out.gap_R[row] = share * kLn2 * fmaf(static_cast<float>(raised), others.mass, others.gap);
        float target = 0.0f;
        if (read && part.target >= 0) {
            float bent[1] = {widen(part.logits[part.target])};
            bend(bent, task.view);
            target = static_cast<float>(static_cast<double>(bent[0]) * task.view.slope / kLog2EDouble);
        }
        out.target_logit_R[row] = target;
    }
}

template <class T, bool kEntropy>
GFT_KERNEL(kTwoPassThreads, 1)
shade_shard_row(const ShardTask task) {
    const AgreedRows& agreed = task.agreed;
    for (long long row = block_index(); row < row_count(task.shard.logits); row += block_count()) {
        Part<T> part = open_shard<T>(task, row);
        RowScales<float> scales{agreed.scale_R[row] * task.view.chain, 0.0f, 0.0f};
        if (kEntropy) {
            scales.tilt = agreed.tilt_R[row] * task.view.chain;
            scales.entropy = agreed.entropy_R[row];
        }
        const double top = agreed.top_R[row] * kLog2EDouble;
        Verdict verdict{};
        verdict.anchor = static_cast<float>(top);
        const float past_top = static_cast<float>(verdict.anchor - top), log_mass = agreed.log_mass_R[row];
        const float unit = expf(-log_mass) * exp2f(past_top);
        const float log_pi_and_entropy = fmaf(kLn2, past_top, scales.entropy - log_mass);  // at t = 0
        verdict.factor = (kEntropy ? fmaf(scales.tilt, log_pi_and_entropy, scales.scale) : scales.scale) * unit;
        verdict.tilt = kLn2 * scales.tilt * unit;
        verdict.silent = scales.scale == 0.0f && scales.tilt == 0.0f;
        if (part.target >= 0) {
            const float logit = widen(part.logits[part.target]);
            const float curve = task.view.bent ? bend_one(logit, task.view).curve : 1.0f;
            verdict.at_target = at_target<kEntropy>(agreed.log_pi_R[row], scales) * curve;
        }
        if (part.edge.element >= 0) part.edge.logit = widen(part.logits[part.edge.element]);
        block_barrier();  // in place: the target's logit has been read by all before it is overwritten
        if (verdict.silent) {
            clear_gradient(part);
        } else {
            shade_row<kEntropy>(part, verdict, task.view);
        }
    }
}

}  // namespace gft::cuda
