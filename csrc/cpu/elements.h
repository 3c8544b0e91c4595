// One logit of any dtype, as a number and back. Rounding is to nearest, ties to even; NaN stays NaN.
#pragma once

#include <cstdint>
#include <cstring>

#include "gft/args.h"

namespace gft::cpu {

struct BFloat16 {
    std::uint16_t bits;
};
struct Float16 {
    std::uint16_t bits;
};

GFT_HD std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

GFT_HD float float_of(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

GFT_HD float widen(float value) { return value; }
GFT_HD float widen(BFloat16 value) { return float_of(std::uint32_t{value.bits} << 16); }

// A half's denormals are read as integers: as float bits they would be denormal too, and flushed (row_kernel.cpp).
GFT_HD float widen(Float16 value) {
    const std::uint32_t size = value.bits & 0x7fffu, sign = (value.bits & 0x8000u) << 16;
    if (size < 0x400u) return float_of(sign | bits_of(static_cast<float>(size) * 0x1p-24f));
    if (size >= 0x7c00u) return float_of(sign | 0x7f800000u | size << 13);
    return float_of(sign | ((size << 13) + 0x38000000u));  // the exponent's bias: 127 - 15 = 112
}

GFT_HD void narrow(float value, float& out) { out = value; }

GFT_HD void narrow(float value, BFloat16& out) {
    const std::uint32_t bits = bits_of(value);
    const bool nan = value != value;
    out.bits = static_cast<std::uint16_t>(nan ? (bits >> 16 | 0x40u) : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

GFT_HD void narrow(float value, Float16& out) {
    const std::uint32_t sign = bits_of(value) >> 16 & 0x8000u, size = bits_of(value) & 0x7fffffffu;
    std::uint32_t half;
    if (size >= 0x7f800000u) {
        half = size == 0x7f800000u ? 0x7c00u : 0x7e00u;
    } else if (size >= 0x477ff000u) {  // 65520 and above round to infinity
        half = 0x7c00u;
    } else if (size < 0x38800000u) {  // below 2^-14: adding 0.5 rounds to a multiple of 2^-24, the half's denormals
        half = bits_of(float_of(size) + 0.5f) - bits_of(0.5f);
    } else {
        half = (size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13;
    }
    out.bits = static_cast<std::uint16_t>(sign | half);
}

GFT_HD std::int64_t element_size(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

GFT_HD double read_element(const void* row, Dtype dtype, std::int64_t v) {
    if (dtype == Dtype::f32) return static_cast<const float*>(row)[v];
    if (dtype == Dtype::bf16) return widen(static_cast<const BFloat16*>(row)[v]);
    return widen(static_cast<const Float16*>(row)[v]);
}

GFT_HD void write_element(void* row, Dtype dtype, std::int64_t v, double value) {
    const float single = static_cast<float>(value);
    if (dtype == Dtype::f32) return narrow(single, static_cast<float*>(row)[v]);
    if (dtype == Dtype::bf16) return narrow(single, static_cast<BFloat16*>(row)[v]);
    narrow(single, static_cast<Float16*>(row)[v]);
}

}  // namespace gft::cpu
