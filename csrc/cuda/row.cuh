// One row as a block sees it, and what is decided about it once its statistics are known. Both row kernels use this.
#pragma once

#include "cuda/credit.cuh"
#include "cuda/vector.cuh"

namespace gft::cuda {

// One launch over R rows. Device pointers; per-row arrays are R long.
struct RowTask {
    LogitRows logits, gradient;  // gradient.data null: statistics only; equal to logits.data: in place
    Credit credit;               // of which only targets and mask are read here
    const float* advantages_R;
    const float* weights_R;
    View view;
    Objective objective;
    bool read_every_row;
    float* loss_R;
    float* log_probs_R;
    float* coefficients_R;
    float* entropy_R;
    float* row_scale_R;
};

// An element outside the vectors, and what was read there; -1: none.
struct Edge {
    int element;
    float logit;
};

// The part of a row that one block holds: `vectors` whole vectors from element `first` on, and one edge element a
// thread.
template <class T>
struct Part {
    long long row;
    const T* logits;          // element 0 of the row
    GradientOf<T>* gradient;  // null: not wanted
    int first, vectors;
    int target;  // element; -1: not in [0, V), which makes the row NaN
    Edge edge;   // this thread's
    float target_logit;
    float advantage, weight;
    bool read;     // the logits matter
    bool aligned;  // the gradient of whole vectors can be stored as whole vectors
};

// The vector that holds the target, counted from `first`; some number that no vector has where it lies elsewhere.
template <class T>
GFT_DEVICE int target_vector(const Part<T>& part) {
    return static_cast<int>(static_cast<unsigned>(part.target - part.first) / kWidth<T>);
}

template <class T>
GFT_DEVICE int target_lane(const Part<T>& part) {
    return static_cast<int>(static_cast<unsigned>(part.target - part.first) % kWidth<T>);
}

template <class T>
GFT_DEVICE Part<T> no_part(long long row) {
    return {row, nullptr, nullptr, 0, 0, -1, {-1, 0}, 0, 0, 0, false, false};
}

// Where block `rank` of `blocks` finds its part of row `row`, and where it writes.
template <class T>
GFT_DEVICE Part<T> locate_part(const LogitRows& from, const LogitRows& to, long long row, int capacity, int rank,
                               int blocks) {
    Part<T> part = no_part<T>(row);
    part.logits = static_cast<const T*>(from.data) + row_offset(from, row);
    const Split split = split_row(reinterpret_cast<std::uintptr_t>(part.logits), from.V, sizeof(T));
    const Slice slice = slice_of(split.vectors, capacity, rank);
    part.first = split.head + slice.first * kWidth<T>;
    part.vectors = slice.count;
    part.edge.element = edge_element(split, from.V, thread_index(), rank == 0, rank == blocks - 1);
    if (to.data == nullptr) return part;
    part.gradient = static_cast<GradientOf<T>*>(to.data) + row_offset(to, row);
    part.aligned = reinterpret_cast<std::uintptr_t>(part.gradient + split.head) % sizeof(GradientVector<T>) == 0;
    return part;
}

// Whether the logits of a row have to be read.
GFT_DEVICE bool row_matters(const RowTask& task, long long row) {
    return is_live(task.credit, row) &&
           is_read(task.advantages_R[row], task.weights_R[row], task.objective, task.read_every_row);
}

template <class T>
GFT_DEVICE Part<T> open_part(const RowTask& task, long long row, int capacity, int rank, int blocks) {
    Part<T> part = locate_part<T>(task.logits, task.gradient, row, capacity, rank, blocks);
    part.read = row_matters(task, row);
    if (!part.read) return part;
    part.advantage = task.advantages_R[row];
    part.weight = task.weights_R[row];
    const std::int64_t target = task.credit.targets_R[row];
    if (target >= 0 && target < task.logits.V) {
        part.target = static_cast<int>(target);
        part.target_logit = widen(part.logits[part.target]);
    }
    if (part.edge.element >= 0) part.edge.logit = widen(part.logits[part.edge.element]);
    return part;
}

// Gradient 0, whatever the logits hold; they are not read.
template <class T>
GFT_DEVICE void clear_gradient(const Part<T>& part) {
    const float zeros[kWidth<T>] = {};
    for (int i = thread_index(); i < part.vectors; i += thread_count())
        write_vector(part.gradient + part.first, i, zeros, part.aligned);
    if (part.edge.element >= 0) narrow(part.gradient + part.edge.element, 0.0f);
}

// A row that nobody reads: gradient and statistics 0.
template <class T>
GFT_DEVICE void clear_part(const RowTask& task, const Part<T>& part, bool leader) {
    if (part.gradient != nullptr) clear_gradient(part);
    if (!leader) return;
    task.loss_R[part.row] = task.log_probs_R[part.row] = task.coefficients_R[part.row] = 0.0f;
    if (task.entropy_R != nullptr) task.entropy_R[part.row] = 0.0f;
    if (task.row_scale_R != nullptr) task.row_scale_R[part.row] = 0.0f;
}

// F1 over one vector or edge element. The target is left out: beside the others it gives log pi near 0 all its digits.
template <bool kEntropy, int kSize>
GFT_DEVICE void observe_others(Softmax& state, float (&logits)[kSize], bool target_inside, int lane, const View& view) {
    bend(logits, view);
    if (target_inside) put(logits, lane, -INFINITY);  // after bend(): a softcap would make -inf finite
    observe<kEntropy>(state, logits, view.slope);
}

// The same over a vector that holds no target, its logits not bent.
template <bool kEntropy, class T>
GFT_DEVICE void observe_vector(Softmax& state, uint4 vector, float slope, T type) {
    float logits[kWidth<T>];
    unpack(vector, logits, type);
    observe<kEntropy>(state, logits, highest(vector, type), slope);
}

// How a row's gradient is written: (factor + tilt * t) * 2^t with t = z - anchor, away from the target. Nobody divides
// by the mass again.
struct Verdict {
    float anchor, factor, tilt, at_target;
    bool silent;  // scale and tilt 0: the gradient is exactly 0, also where the logits are NaN
};

// F7 at the target, before the transform's curve.
template <bool kEntropy>
GFT_DEVICE float at_target(float log_pi, const RowScales<float>& scales) {
    const float pull = dlogit_target(log_pi, scales.scale);
    return kEntropy ? pull + dlogit_tilted(log_pi, 0.0f, scales.tilt, scales.entropy) : pull;
}

// F7 at t = z - anchor. A banned token has t = -inf, and 2^-200 is 0 as well.
template <bool kEntropy>
GFT_DEVICE float share(float t, const Verdict& verdict) {
    return (kEntropy ? fmaf(verdict.tilt, fmaxf(t, -200.0f), verdict.factor) : verdict.factor) * exp2_fast(t);
}

// Two logits that need no bending.
template <bool kEntropy>
GFT_DEVICE Pair share_pair(Pair logits, const Verdict& verdict, float slope) {
    const Pair t = fma_pair(logits, {slope, slope}, {-verdict.anchor, -verdict.anchor});
    Pair factor{verdict.factor, verdict.factor};
    if (kEntropy) factor = fma_pair({verdict.tilt, verdict.tilt}, {fmaxf(t.x, -200.0f), fmaxf(t.y, -200.0f)}, factor);
    return multiply_pair(factor, {exp2_fast(t.x), exp2_fast(t.y)});
}

// H in nats from log pi of the target and the others' state. With a certain target the whole row's mass has lost what
// log pi still has, and F7 adds the two.
GFT_DEVICE float entropy_beside(float log_pi, Softmax others) {
    const float pi = expf(log_pi), rest = -expm1f(log_pi);
    const float of_target = pi == 0.0f ? 0.0f : -pi * log_pi;
    if (rest == 0.0f) return of_target;
    return entropy(of_target + rest * (logf(others.mass) - logf(rest)), rest * kLn2 * others.gap / others.mass);
}

// F3, F4, F6 and the row's share of F7 from the softmax of everything but the target. The leader writes them down.
template <bool kEntropy, class T>
GFT_DEVICE Verdict settle(const RowTask& task, const Part<T>& part, Softmax others, bool leader) {
    float target[1] = {part.target_logit};
    bend(target, task.view);
    const float gap = kLn2 * fmaf(target[0], task.view.slope, -others.top);  // z_y - top, in nats
    Softmax all = others;
    observe<kEntropy>(all, target, task.view.slope);
    const bool spoilt = part.target < 0 || all.mass != all.mass;
    const float log_pi = spoilt ? NAN : log_prob(gap, State<float>{0.0f, others.mass});

    const float mean_gap = kEntropy ? kLn2 * all.gap / all.mass : 0.0f;
    RowScales<float> scales{};
    if (kEntropy) scales.entropy = entropy_beside(log_pi, others);
    const RowTerms<float> row = row_terms(log_pi, scales.entropy, part.advantage, part.row, task.objective);
    scales.scale = weighed(part.weight, row.kappa) * task.view.chain;
    if (kEntropy) scales.tilt = part.weight * static_cast<float>(task.objective.entropy_coef) * task.view.chain;
    const bool silent = scales.scale == 0.0f && scales.tilt == 0.0f;
    const float size = row_size(scales.scale, scales.tilt, scales.entropy);
    if (leader) {
        task.loss_R[part.row] = weighed(part.weight, row.loss);
        task.log_probs_R[part.row] = log_pi;
        task.coefficients_R[part.row] = row.coefficient;
        if (kEntropy && task.entropy_R != nullptr) task.entropy_R[part.row] = scales.entropy;
        if (task.row_scale_R != nullptr) task.row_scale_R[part.row] = size * (1.0f / kFp16Peak);
    }
    if (task.row_scale_R != nullptr && !silent) {
        scales.scale = scales.scale / size * kFp16Peak;
        scales.tilt = scales.tilt / size * kFp16Peak;
    }
    Verdict verdict{};
    verdict.anchor = all.top;
    verdict.factor = spoilt ? NAN : (scales.scale - scales.tilt * mean_gap) / all.mass;  // log pi_v + H = t - mean_gap
    verdict.tilt = kLn2 * scales.tilt / all.mass;
    const float curve = task.view.bent ? bend_one(part.target_logit, task.view).curve : 1.0f;
    verdict.at_target = at_target<kEntropy>(log_pi, scales) * curve;
    verdict.silent = silent;
    return verdict;
}

// F7 away from the target, over one vector or edge element: logits in, gradient out.
template <bool kEntropy, int kSize>
GFT_DEVICE void shade(float (&values)[kSize], const Verdict& verdict, const View& view) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
        const Bent bent = view.bent ? bend_one(values[j], view) : Bent{values[j], 1.0f};
        values[j] = bent.curve * share<kEntropy>(fmaf(bent.z, view.slope, -verdict.anchor), verdict);
    }
#pragma unroll
    for (int j = 0; j < kSize; ++j) values[j] = verdict.silent ? 0.0f : values[j];
}

// The gradient of this thread's edge element.
template <bool kEntropy, class T>
GFT_DEVICE void shade_edge(const Part<T>& part, const Verdict& verdict, const View& view) {
    if (part.edge.element < 0) return;
    float value[1] = {part.edge.logit};
    shade<kEntropy>(value, verdict, view);
    narrow(part.gradient + part.edge.element, part.edge.element == part.target ? verdict.at_target : value[0]);
}

// The gradient of vector i of the part, whose logits are `logits`. Its target is still to be written.
template <bool kEntropy, class T>
GFT_DEVICE void shade_vector(const Part<T>& part, int i, uint4 logits, const Verdict& verdict, const View& view) {
    float values[kWidth<T>];
    unpack(logits, values, T{});
    shade<kEntropy>(values, verdict, view);
    write_vector(part.gradient + part.first, i, values, part.aligned);
}

// The same where nothing is out of the ordinary: a row that is not silent, logits that are not bent, an aligned
// gradient.
template <bool kEntropy, class T>
GFT_DEVICE GradientVector<T> shade_plain(uint4 logits, const Verdict& verdict, float slope, T type) {
    float values[kWidth<T>];
    unpack(logits, values, type);
#pragma unroll
    for (int j = 0; j < kWidth<T>; j += 2) {
        const Pair pair = share_pair<kEntropy>({values[j], values[j + 1]}, verdict, slope);
        values[j] = pair.x;
        values[j + 1] = pair.y;
    }
    return pack(values, GradientOf<T>{});
}

// By the thread that has written the target's vector.
template <class T>
GFT_DEVICE void write_target(const Part<T>& part, const Verdict& verdict) {
    narrow(part.gradient + part.target, verdict.at_target);
}

}  // namespace gft::cuda
