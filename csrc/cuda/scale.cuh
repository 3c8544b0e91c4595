// The backward's one multiplication: gradient * row_scale * upstream, in float32, rounded once, also to another type.
#pragma once

#include "cuda/two_pass_row.cuh"

namespace gft::cuda {

constexpr int kScaleThreads = 512;

struct ScaleTask {
    LogitRows gradient, scaled;  // the same data: in place, in the same type
    const float* row_scale_R;    // null: 1
    const float* upstream;       // () or, if per_row, R long; read here, so that the host never waits for it
    bool per_row;
};

template <class T>
GFT_KERNEL(kScaleThreads, 2)
scale_row(const ScaleTask task) {
    const bool inplace = task.gradient.data == task.scaled.data;
    const int whole_row = slice_capacity(task.gradient.V, sizeof(T), 1);
    for (long long row = block_index(); row < row_count(task.gradient); row += block_count()) {
        const float scale = task.row_scale_R == nullptr ? 1.0f : task.row_scale_R[row];
        const float factor = scale * task.upstream[task.per_row ? row : 0];
        if (inplace && factor == 1.0f) continue;  // loss.backward() in place ends here: nothing is read or written
        const Part<T> part = locate_part<T>(task.gradient, task.scaled, row, whole_row, 0, 1);
        for_each_vector<false>(part, [&](int i, uint4 vector) {
            float values[kWidth<T>];
            unpack(vector, values, T{});
#pragma unroll
            for (int j = 0; j < kWidth<T>; ++j) values[j] *= factor;
            write_vector(part.gradient + part.first, i, values, part.aligned);
        });
        if (part.edge.element >= 0)
            narrow(part.gradient + part.edge.element, factor * widen(part.logits[part.edge.element]));
    }
}

}  // namespace gft::cuda
