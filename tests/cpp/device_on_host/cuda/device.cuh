// The host twin of csrc/cuda/device.cuh: the same names, carried out by scheduler.h. Found before it on the include
// path.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/elements.h"
#include "scheduler.h"

#define GFT_KERNEL(max_threads, min_blocks) [[maybe_unused]] static void
#define GFT_DEVICE [[maybe_unused]] static inline

struct uint4 {
    unsigned x, y, z, w;
};
struct uint2 {
    unsigned x, y;
};
struct float2 {
    float x, y;
};

namespace gft::cuda {

using device_on_host::current;
using device_on_host::me;

GFT_DEVICE int thread_index() { return me().thread; }
GFT_DEVICE int thread_count() { return current->threads; }
GFT_DEVICE long long block_index() { return me().block->index; }
GFT_DEVICE long long block_count() { return current->grid; }

GFT_DEVICE void block_barrier() { device_on_host::wait_at(me().block->barrier); }
GFT_DEVICE int cluster_blocks() { return static_cast<int>(current->blocks.size()); }
GFT_DEVICE int cluster_rank() { return me().block->rank; }
GFT_DEVICE void cluster_barrier() { device_on_host::wait_at(current->barrier); }

GFT_DEVICE unsigned char* shared_of(device_on_host::Block& block) {
    const auto address = reinterpret_cast<std::uintptr_t>(block.shared.data());
    return block.shared.data() + (16 - address % 16) % 16;
}

// Its bytes as of the device's barrier: what is missing still, and how often it has closed.
struct Mailbox {
    std::int32_t missing;
    std::uint16_t expecting, closed;
};

GFT_DEVICE void close_if_complete(Mailbox& mailbox) {
    if (mailbox.expecting == 0 || mailbox.missing != 0) return;
    mailbox.expecting = 0;
    ++mailbox.closed;
}

GFT_DEVICE void open_mailbox(Mailbox* mailbox) { *mailbox = {0, 0, 0}; }

GFT_DEVICE void expect_letters(Mailbox* mailbox, int letters) {
    if (mailbox->expecting != 0) __builtin_trap();  // it has not closed since the last time
    mailbox->expecting = 1;
    mailbox->missing += letters;
    close_if_complete(*mailbox);
}

GFT_DEVICE void send_letter(uint4 letter, uint4* to, Mailbox* mailbox, int rank) {
    device_on_host::Block& other = current->blocks[static_cast<std::size_t>(rank)];
    const auto there = [&](auto* mine) {
        const auto offset = reinterpret_cast<unsigned char*>(mine) - shared_of(*me().block);
        return reinterpret_cast<decltype(mine)>(shared_of(other) + offset);
    };
    std::memset(there(to), 0xff, sizeof letter);  // until it lands
    device_on_host::post(other, [letter, to = there(to), mailbox = there(mailbox)] {
        *to = letter;
        --mailbox->missing;
        close_if_complete(*mailbox);
    });
}

GFT_DEVICE void await_letters(const Mailbox* mailbox, int parity) {
    device_on_host::wait_until([=] { return mailbox->closed % 2 != parity; });
}

GFT_DEVICE unsigned char* shared_memory() { return shared_of(*me().block); }

template <class Value>
GFT_DEVICE Value exchange(Value value, int from) {
    device_on_host::Warp& warp = me().block->warps[static_cast<std::size_t>(me().thread / 32)];
    std::uint64_t* slots = warp.exchange[me().exchanges++ % 2];
    std::memcpy(slots + me().thread % 32, &value, sizeof value);
    device_on_host::wait_at(warp.barrier);
    std::memcpy(&value, slots + from, sizeof value);
    return value;
}

template <class Value>
GFT_DEVICE Value shuffle_xor(Value value, int lanes) {
    return exchange(value, (me().thread % 32) ^ lanes);
}

GFT_DEVICE int first_lane(bool here) {
    int lane = here ? me().thread % 32 : 32;
    for (int lanes = 16; lanes > 0; lanes /= 2) lane = std::min(lane, shuffle_xor(lane, lanes));
    return lane;
}

GFT_DEVICE void land(const device_on_host::Copy& copy) { std::memcpy(copy.to, copy.from, 16); }

GFT_DEVICE void copy_async(uint4* shared, const uint4* global) {
    const device_on_host::Copy copy{shared, global};
    if (reinterpret_cast<std::uintptr_t>(global) % 16 != 0) __builtin_trap();
    if (current->random() % 2 == 0) return land(copy);
    std::memset(shared, 0xff, sizeof *shared);  // until it lands, the slot is neither the old vector nor the new
    me().groups.back().push_back(copy);
}

GFT_DEVICE void commit_copies() { me().groups.emplace_back(); }

template <int kPendingGroups>
GFT_DEVICE void await_copies() {
    auto& groups = me().groups;
    const auto landed = std::max<std::ptrdiff_t>(0, static_cast<std::ptrdiff_t>(groups.size()) - 1 - kPendingGroups);
    for (auto group = groups.begin(); group != groups.begin() + landed; ++group)
        for (const device_on_host::Copy& copy : *group) land(copy);
    groups.erase(groups.begin(), groups.begin() + landed);
}

template <class Vector>
GFT_DEVICE void must_be_aligned(const Vector* address) {
    if (reinterpret_cast<std::uintptr_t>(address) % sizeof(Vector) != 0) __builtin_trap();
}

GFT_DEVICE uint4 load_vector(const uint4* from) {
    must_be_aligned(from);
    return *from;
}

template <class Vector>
GFT_DEVICE void store_vector(Vector* to, Vector value) {
    must_be_aligned(to);
    *to = value;
}

GFT_DEVICE void add_count(int* counter, int n) { *counter += n; }

// As far off as the instruction may be, up or down by what it was asked, so that tolerances hold on a device too.
GFT_DEVICE float off_by(int ulps, float exact, float asked) {
    const float toward = gft::cpu::bits_of(asked) * 2654435761u >> 31 ? HUGE_VALF : 0.0f;
    for (; ulps > 0 && std::isnormal(exact); --ulps) exact = std::nextafter(exact, toward);
    return exact;
}

GFT_DEVICE float exp2_fast(float x) {
    const float exact = x == 0.0f ? 1.0f : off_by(2, std::exp2(x), x);
    return std::fpclassify(exact) == FP_SUBNORMAL ? 0.0f : exact;
}
GFT_DEVICE float reciprocal_fast(float x) { return off_by(1, 1.0f / x, x); }

struct Pair {
    float x, y;
};

GFT_DEVICE Pair fma_pair(Pair a, Pair b, Pair c) { return {std::fma(a.x, b.x, c.x), std::fma(a.y, b.y, c.y)}; }
GFT_DEVICE Pair add_pair(Pair a, Pair b) { return {a.x + b.x, a.y + b.y}; }
GFT_DEVICE Pair multiply_pair(Pair a, Pair b) { return {a.x * b.x, a.y * b.y}; }

GFT_DEVICE float float_of_bits(unsigned bits) { return gft::cpu::float_of(bits); }
GFT_DEVICE unsigned bits_of_float(float value) { return gft::cpu::bits_of(value); }

template <class Half>
GFT_DEVICE unsigned pack_pair(float low, float high) {
    Half halves[2];
    gft::cpu::narrow(low, halves[0]);
    gft::cpu::narrow(high, halves[1]);
    return halves[0].bits | static_cast<unsigned>(halves[1].bits) << 16;
}

GFT_DEVICE unsigned pack_bf16(float low, float high) { return pack_pair<gft::cpu::BFloat16>(low, high); }
GFT_DEVICE unsigned pack_f16(float low, float high) { return pack_pair<gft::cpu::Float16>(low, high); }

GFT_DEVICE float2 unpack_f16(unsigned bits) {
    return {gft::cpu::widen(gft::cpu::Float16{static_cast<std::uint16_t>(bits & 0xffffu)}),
            gft::cpu::widen(gft::cpu::Float16{static_cast<std::uint16_t>(bits >> 16)})};
}

template <class Half>
GFT_DEVICE unsigned larger_pair(unsigned a, unsigned b) {
    const auto half = [](unsigned pair, int k) {
        return gft::cpu::widen(Half{static_cast<std::uint16_t>(pair >> (16 * k))});
    };
    return pack_pair<Half>(std::fmax(half(a, 0), half(b, 0)), std::fmax(half(a, 1), half(b, 1)));
}

GFT_DEVICE unsigned larger_bf16(unsigned a, unsigned b) { return larger_pair<gft::cpu::BFloat16>(a, b); }
GFT_DEVICE unsigned larger_f16(unsigned a, unsigned b) { return larger_pair<gft::cpu::Float16>(a, b); }

}  // namespace gft::cuda
