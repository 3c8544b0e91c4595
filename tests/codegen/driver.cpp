// One pass of one instruction set over one row, for an instruction counter: driver SET DTYPE PASS V.
// Exit codes: 0 done, 1 wrong arguments, 2 this processor (or the emulated one) lacks the instruction set.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu/instruction_sets.h"

namespace {

using namespace gft;

constexpr Transform kPlain{1.0, 0.0, 1.0};

std::size_t bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Logits between -2 and 2, deterministic, in the row's dtype. The numbers do not matter, only that none is special.
std::vector<unsigned char> row_of(Dtype dtype, std::int64_t V) {
    std::vector<unsigned char> row(bytes_of(dtype) * static_cast<std::size_t>(V));
    for (std::int64_t v = 0; v < V; ++v) {
        const float logit = 2.0f * std::sin(0.37f * static_cast<float>(v));
        std::uint32_t bits;
        std::memcpy(&bits, &logit, 4);
        const std::uint16_t half = dtype == Dtype::bf16
                                       ? static_cast<std::uint16_t>(bits >> 16)
                                       : static_cast<std::uint16_t>(((bits >> 16) & 0x8000) | (0x3800 + v % 1024));
        if (dtype == Dtype::f32)
            std::memcpy(row.data() + 4 * v, &logit, 4);
        else
            std::memcpy(row.data() + 2 * v, &half, 2);
    }
    return row;
}

}  // namespace

// The counter is switched on inside this function and off when it returns: its name must survive the linker.
extern "C" __attribute__((noinline)) double gft_counted_pass(const cpu::RowKernels& kernels, const char* pass,
                                                             const void* row, void* out, Dtype dtype, std::int64_t V) {
    if (std::strcmp(pass, "statistics") == 0) {
        return kernels.statistics(row, dtype, V, V / 2, -INFINITY, kPlain, false).mass;
    }
    if (std::strcmp(pass, "gradient") == 0) kernels.gradient(row, out, dtype, V, {2.0, 9.0}, {-0.5, 0.0, 0.0}, kPlain);
    if (std::strcmp(pass, "tilted") == 0) kernels.gradient(row, out, dtype, V, {2.0, 9.0}, {-0.5, 0.1, 8.0}, kPlain);
    if (std::strcmp(pass, "scale") == 0) kernels.scale(row, out, dtype, dtype, V, 0.5f);
    return 0.0;
}

int main(int count, char** arguments) {
    if (count != 5) return 1;
    const cpu::RowKernels* kernels = cpu::find_kernels(arguments[1]);
    if (kernels == nullptr) return 2;
    const char* name = arguments[2];
    const Dtype dtype = std::strcmp(name, "float32") == 0    ? Dtype::f32
                        : std::strcmp(name, "bfloat16") == 0 ? Dtype::bf16
                                                             : Dtype::f16;
    const std::int64_t V = std::atoll(arguments[4]);
    const auto row = row_of(dtype, V);
    std::vector<unsigned char> out(row.size());
    std::printf("%g\n", gft_counted_pass(*kernels, arguments[3], row.data(), out.data(), dtype, V));
    return 0;
}
