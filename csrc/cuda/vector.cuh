// Sixteen bytes of logits and the floats they hold; element types are tags of the right size.
#pragma once

#include "cuda/device.cuh"
#include "cuda/plan.h"

namespace gft::cuda {

struct Bf16 {
    std::uint16_t bits;
};
struct F16 {
    std::uint16_t bits;
};

// float32 logits whose gradient is stored as Half: where that is in place, a row's lies at the start of its own
// storage.
template <class Half>
struct RoundedTo {
    float logit;
};

template <class T>
struct Stored {
    using Gradient = T;
    using Vector = uint4;  // the gradient of a vector of logits
};
template <class Half>
struct Stored<RoundedTo<Half>> {
    using Gradient = Half;
    using Vector = uint2;
};
template <class T>
using GradientOf = typename Stored<T>::Gradient;
template <class T>
using GradientVector = typename Stored<T>::Vector;

// act(T{}) for the T of logits and of their gradient, on the host. Other types than the logits' own are for float32.
template <class Act>
auto with_types(Dtype logits, Dtype gradient, Act act) {
    if (logits == Dtype::bf16) return act(Bf16{});
    if (logits == Dtype::f16) return act(F16{});
    if (gradient == Dtype::bf16) return act(RoundedTo<Bf16>{});
    return gradient == Dtype::f16 ? act(RoundedTo<F16>{}) : act(float{});
}

template <class T>
constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));

GFT_DEVICE void unpack(uint4 vector, float (&values)[4], float) {
    values[0] = float_of_bits(vector.x);
    values[1] = float_of_bits(vector.y);
    values[2] = float_of_bits(vector.z);
    values[3] = float_of_bits(vector.w);
}

GFT_DEVICE void unpack(uint4 vector, float (&values)[8], Bf16) {
    const unsigned words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        values[2 * i] = float_of_bits(words[i] << 16);
        values[2 * i + 1] = float_of_bits(words[i] & 0xffff0000u);
    }
}

GFT_DEVICE void unpack(uint4 vector, float (&values)[8], F16) {
    const unsigned words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack_f16(words[i]);
        values[2 * i] = pair.x;
        values[2 * i + 1] = pair.y;
    }
}

template <class Half>
GFT_DEVICE void unpack(uint4 vector, float (&values)[4], RoundedTo<Half>) {
    unpack(vector, values, float{});
}

// The highest of a vector's values. In halves two comparisons are one instruction.
GFT_DEVICE float highest(uint4 v, float) {
    return fmaxf(fmaxf(float_of_bits(v.x), float_of_bits(v.y)), fmaxf(float_of_bits(v.z), float_of_bits(v.w)));
}

GFT_DEVICE float highest(uint4 v, Bf16) {
    const unsigned pair = larger_bf16(larger_bf16(v.x, v.y), larger_bf16(v.z, v.w));
    return fmaxf(float_of_bits(pair << 16), float_of_bits(pair & 0xffff0000u));
}

GFT_DEVICE float highest(uint4 v, F16) {
    const float2 pair = unpack_f16(larger_f16(larger_f16(v.x, v.y), larger_f16(v.z, v.w)));
    return fmaxf(pair.x, pair.y);
}

template <class Half>
GFT_DEVICE float highest(uint4 v, RoundedTo<Half>) {
    return highest(v, float{});
}

GFT_DEVICE uint4 pack(const float (&v)[4], float) {
    return {bits_of_float(v[0]), bits_of_float(v[1]), bits_of_float(v[2]), bits_of_float(v[3])};
}

GFT_DEVICE uint4 pack(const float (&v)[8], Bf16) {
    return {pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7])};
}

GFT_DEVICE uint4 pack(const float (&v)[8], F16) {
    return {pack_f16(v[0], v[1]), pack_f16(v[2], v[3]), pack_f16(v[4], v[5]), pack_f16(v[6], v[7])};
}

GFT_DEVICE uint2 pack(const float (&v)[4], Bf16) { return {pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3])}; }
GFT_DEVICE uint2 pack(const float (&v)[4], F16) { return {pack_f16(v[0], v[1]), pack_f16(v[2], v[3])}; }

template <class Half>
GFT_DEVICE uint4 pack(const float (&v)[4], RoundedTo<Half>) {  // logits, as they are read
    return pack(v, float{});
}

GFT_DEVICE float widen(float value) { return value; }
template <class Half>
GFT_DEVICE float widen(RoundedTo<Half> value) {
    return value.logit;
}
GFT_DEVICE float widen(Bf16 value) { return float_of_bits(static_cast<unsigned>(value.bits) << 16); }
GFT_DEVICE float widen(F16 value) { return unpack_f16(value.bits).x; }

GFT_DEVICE void narrow(float* to, float value) { *to = value; }
GFT_DEVICE void narrow(Bf16* to, float value) { to->bits = static_cast<std::uint16_t>(pack_bf16(value, 0.0f)); }
GFT_DEVICE void narrow(F16* to, float value) { to->bits = static_cast<std::uint16_t>(pack_f16(value, 0.0f)); }

// Vector `i` of an array of T that starts at `to`: one store where the array is aligned for it, else one an element.
// (A gradient gets the logits' alignment wherever that is possible, so the second way is the rare one.)
template <class T, int kSize>
GFT_DEVICE void write_vector(T* to, int i, const float (&values)[kSize], bool aligned) {
    if (aligned) {
        using Vector = decltype(pack(values, T{}));
        store_vector(reinterpret_cast<Vector*>(to) + i, pack(values, T{}));
        return;
    }
#pragma unroll
    for (int j = 0; j < kSize; ++j) narrow(to + static_cast<long long>(i) * kSize + j, values[j]);
}

// values[lane] = value without indexing registers at run time, which would move the array to local memory.
template <int kSize>
GFT_DEVICE void put(float (&values)[kSize], int lane, float value) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) values[j] = j == lane ? value : values[j];
}

// -inf in one lane of a vector of logits.
template <class T>
GFT_DEVICE void leave_out(uint4& vector, int lane, T type) {
    float values[kWidth<T>];
    unpack(vector, values, type);
    put(values, lane, -INFINITY);
    vector = pack(values, type);
}

}  // namespace gft::cuda
