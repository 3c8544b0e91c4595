// Every instruction set this processor has, against plain double arithmetic, at every length around its block.
#include <cstring>
#include <vector>

#include "check.h"
#include "cpu/elements.h"
#include "cpu/instruction_sets.h"
#include "gft/formulas.h"

namespace {

using namespace gft;
using cpu::RowKernels;

constexpr Transform kPlain{1.0, 0.0, 1.0}, kBent{-0.5, 20.0, 0.7};

std::vector<float> wave(std::int64_t V, float size, float offset) {
    std::vector<float> row(static_cast<std::size_t>(V));
    for (std::int64_t v = 0; v < V; ++v) row[v] = offset + size * std::sin(0.37f * v + 0.001f * v * v);
    return row;
}

double nats(float logit, const Transform& t) {
    return transform<double>(logit, t.logit_scale, t.softcap, t.temperature);
}

void test_row(const RowKernels& kernels, const std::vector<float>& row, const Transform& t, std::int64_t skipped) {
    const auto V = static_cast<std::int64_t>(row.size());
    State<double> state{neg_inf<double>(), 0.0};
    for (std::int64_t v = 0; v < V; ++v) {
        if (v != skipped) state = observe(state, nats(row[v], t));
    }
    const auto found = kernels.statistics(row.data(), Dtype::f32, V, skipped, -INFINITY, t, true);
    CHECK(is_near(found.top + std::log(found.mass), state.top + std::log(state.mass), 3e-6));
    double gap = 0.0;
    for (std::int64_t v = 0; v < V; ++v) {
        const double z = nats(row[v], t) - found.top;
        if (v != skipped && z != -INFINITY) gap += z * std::exp(z);
    }
    CHECK(std::fabs(found.gap - gap) <= 1e-5 * (found.mass + std::fabs(gap)));
    std::vector<float> gradient(row.size() + 1, 123.0f);
    for (const RowScales<double>& scales : {RowScales<double>{-3.0, 0.0, 0.0}, RowScales<double>{-3.0, 0.7, 2.5}}) {
        kernels.gradient(row.data(), gradient.data(), Dtype::f32, V, {state.top, std::log(state.mass)}, scales, t);
        for (std::int64_t v = 0; v < V; ++v) {
            const double slope = transform_slope<double>(row[v], t.logit_scale, t.softcap, t.temperature);
            const double log_pi = nats(row[v], t) - state.top - std::log(state.mass), pi = std::exp(log_pi);
            const double truth = dlogit_tilted(log_pi, scales.scale, scales.tilt, scales.entropy) * slope;
            const double tilted = dlogit_tilted(log_pi, 0.0, scales.tilt, scales.entropy);
            const double parts = (3.0 * pi + std::fabs(tilted)) * std::fabs(slope);  // they may cancel
            CHECK(std::fabs(gradient[v] - truth) <= 1e-5 * parts + 1e-36);           // float denormals are flushed
        }
    }
    CHECK(gradient.back() == 123.0f);  // nothing is written past the row
}

void test_lengths(const RowKernels& kernels) {
    for (std::int64_t V = 2; V < 150; ++V) {
        for (const Transform& t : {kPlain, kBent}) test_row(kernels, wave(V, 5.0f, 3.0f), t, V / 2);
    }
    for (std::int64_t V : {1023, 1025, 8191, 8192, 8257, 20011}) {
        test_row(kernels, wave(V, 5.0f, 1e4f), kPlain, V - 1);
        test_row(kernels, wave(V, 8.0f, 0.0f), kBent, -1);
    }
}

void test_anchors(const RowKernels& kernels) {
    auto late = wave(9024, 1.0f, -1000.0f);  // a prefix of banned tokens, all else near -1000, and no tail
    for (int v = 0; v < 5000; ++v) late[v] = -INFINITY;
    late[8990] = -1.0f;  // raises the anchor by 999
    test_row(kernels, late, kPlain, 6000);
    std::vector<float> ramp(4000);
    for (int v = 0; v < 4000; ++v) ramp[v] = 0.9f * v;
    test_row(kernels, ramp, kPlain, 3);
    auto masked = wave(3000, 1.0f, 0.0f);  // masked with float's lowest, as some libraries do
    for (int v = 0; v < 2000; ++v) masked[v] = -3.4e38f;
    test_row(kernels, masked, kPlain, 2500);
    const std::vector<float> banned(3000, -INFINITY);
    const auto none = kernels.statistics(banned.data(), Dtype::f32, 3000, -1, -INFINITY, kPlain, true);
    CHECK(none.top == -INFINITY && none.mass == 0.0 && none.gap == 0.0);
}

void test_spoilt_rows(const RowKernels& kernels) {
    for (float bad : {NAN, INFINITY}) {
        for (std::int64_t at : {0, 1500, 2999}) {
            auto row = wave(3000, 1.0f, 0.0f);
            row[at] = bad;
            CHECK(std::isnan(kernels.statistics(row.data(), Dtype::f32, 3000, 7, -INFINITY, kPlain, false).mass));
        }
    }
}

// Rounding to 16 bits may not carry out of a NaN: one of all ones comes from memory that nobody has written.
void test_a_spoilt_scale(const RowKernels& kernels) {
    const std::int64_t all_ones = 0x7fffffffffffffff;
    double nan;
    std::memcpy(&nan, &all_ones, sizeof nan);
    const std::vector<cpu::BFloat16> row(100, cpu::BFloat16{0x3f80});
    std::vector<cpu::BFloat16> gradient(row.size());
    for (const RowScales<double>& scales : {RowScales<double>{nan, 0.0, 0.0}, RowScales<double>{-3.0, nan, 2.5}}) {
        kernels.gradient(row.data(), gradient.data(), Dtype::bf16, 100, {1.0, 4.6}, scales, kPlain);
        for (const cpu::BFloat16 element : gradient) CHECK(std::isnan(cpu::widen(element)));
    }
}

template <class T>
std::uint16_t narrowed(float value) {
    T out;
    cpu::narrow(value, out);
    return out.bits;
}

// To nearest, ties to even; spelt out, as the portable kernels and the sweep below share this code.
void test_scalar_rounding() {
    CHECK(narrowed<cpu::BFloat16>(1.0f + 0x1p-8f) == 0x3f80);
    CHECK(narrowed<cpu::BFloat16>(1.0f + 0x3p-8f) == 0x3f82);
    CHECK(narrowed<cpu::BFloat16>(-3.4e38f) == 0xff80);
    CHECK(std::isnan(cpu::widen(cpu::BFloat16{narrowed<cpu::BFloat16>(cpu::float_of(0x7f800001u))})));
    CHECK(narrowed<cpu::Float16>(1.0f + 0x1p-11f) == 0x3c00);
    CHECK(narrowed<cpu::Float16>(1.0f + 0x3p-11f) == 0x3c02);
    CHECK(narrowed<cpu::Float16>(65519.0f) == 0x7bff && narrowed<cpu::Float16>(65520.0f) == 0x7c00);
    CHECK(narrowed<cpu::Float16>(0x1p-24f) == 0x0001 && narrowed<cpu::Float16>(-0x1p-25f) == 0x8000);
    CHECK(cpu::widen(cpu::Float16{0x0001}) == 0x1p-24f && cpu::widen(cpu::Float16{0xbc00}) == -1.0f);
}

// Vector stores against the scalar rounding: every half of a sweep of values, ties, denormals, infinities and NaN.
template <class T>
void test_rounding(const RowKernels& kernels, Dtype dtype) {
    std::vector<T> row(1 << 16), scaled(row.size());
    for (std::size_t i = 0; i < row.size(); ++i) row[i].bits = static_cast<std::uint16_t>(i);
    for (float factor : {1.0f, 0.7f, 1.5f, 3e-3f, cpu::float_of(0x7fffffffu)}) {
        kernels.scale(row.data(), scaled.data(), dtype, dtype, static_cast<std::int64_t>(row.size()), factor);
        for (std::size_t i = 0; i < row.size(); ++i) {
            const float value = cpu::widen(row[i]);
            T expected;
            cpu::narrow(value * factor, expected);
            // AVX512_BF16 rounds float denormals to zero; that is below any gradient.
            const bool tiny = std::fabs(value) < 1e-37f || std::fabs(value * factor) < 1e-37f;
            const bool both_nan = std::isnan(value * factor) && std::isnan(cpu::widen(scaled[i]));
            CHECK(both_nan || scaled[i].bits == expected.bits || (dtype == Dtype::bf16 && tiny));
        }
    }
}

}  // namespace

void test_row_kernels() {
    int count = 0;
    const cpu::InstructionSet* sets = cpu::instruction_sets(count);
    for (int i = 0; i < count; ++i) {
        const RowKernels& kernels = *sets[i].kernels;
        std::printf("row kernels: %s%s\n", kernels.name, sets[i].runs_here ? "" : " (not on this processor)");
        if (!sets[i].runs_here) continue;
        CHECK(cpu::find_kernels(kernels.name) == &kernels);
        test_lengths(kernels);
        test_anchors(kernels);
        test_spoilt_rows(kernels);
        test_a_spoilt_scale(kernels);
        test_rounding<cpu::BFloat16>(kernels, Dtype::bf16);
        test_rounding<cpu::Float16>(kernels, Dtype::f16);
    }
    test_scalar_rounding();
    CHECK(cpu::find_kernels("no such set") == nullptr);
}
