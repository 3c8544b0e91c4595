// The two passes over a row in plain doubles, one element at a time: for transforms that float32 is too short for
// (softcap 1e6, temperature 1e-45), where being right is all that is asked. The definition the row kernels are a faster
// text of.
#pragma once

#include <cmath>

#include "cpu/elements.h"
#include "cpu/instruction_sets.h"
#include "gft/formulas.h"

namespace gft::cpu {

// Whether the row kernels' float32 constants, and their products with any logit and scale that matter, are normal
// numbers, and the rounding of a float32 tanh, 1e-7, stays below 1e-3 nats.
GFT_HD bool in_float_range(const Transform& t) {
    const auto within = [](double size) { return std::fabs(size) >= 1e-15 && std::fabs(size) <= 1e15; };
    if (!within(t.logit_scale / t.temperature)) return false;
    if (t.softcap == 0.0) return true;
    return within(t.softcap / t.temperature) && within(t.logit_scale / t.softcap) && t.softcap / t.temperature <= 1e4;
}

GFT_HD double transformed(double logit, const Transform& t) {
    return transform(logit, t.logit_scale, t.softcap, t.temperature);
}

GFT_HD RowStatistics exact_statistics(const void* row, Dtype dtype, std::int64_t V, std::int64_t skipped, double,
                                      const Transform& t, bool want_gap) {
    State<double> state{neg_inf<double>(), 0.0};
    double gap = 0.0;
    for (std::int64_t v = 0; v < V; ++v) {
        const double z = transformed(read_element(row, dtype, v), t);
        if (v == skipped || z == neg_inf<double>()) continue;
        const State<double> next = observe(state, z);
        if (want_gap) gap = raise_gap(gap, state.mass, state.top - next.top) + raise_gap(0.0, 1.0, z - next.top);
        state = next;
    }
    return {state.top, state.mass, gap};
}

GFT_HD void exact_gradient(const void* row, void* out, Dtype dtype, std::int64_t V, const Normaliser& normaliser,
                           const RowScales<double>& scales, const Transform& t) {
    for (std::int64_t v = 0; v < V; ++v) {
        const double logit = read_element(row, dtype, v);
        const double log_pi = (transformed(logit, t) - normaliser.top) - normaliser.log_mass;
        const double in_nats = scales.tilt == 0.0 ? dlogit_other(log_pi, scales.scale)
                                                  : dlogit_tilted(log_pi, scales.scale, scales.tilt, scales.entropy);
        write_element(out, dtype, v, in_nats * transform_slope(logit, t.logit_scale, t.softcap, t.temperature));
    }
}

}  // namespace gft::cpu
