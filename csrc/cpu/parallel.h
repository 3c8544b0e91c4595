// Rows over threads. Which thread takes a row changes nothing about its result, so neither does their number.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace gft::cpu {

// The OpenMP pool that is already in the process, PyTorch's, found by name: nothing is linked. Its workers spin for a
// while after every parallel operator, and threads of our own would have to share the cores with them (two threads ran
// 1.1 to 1.5 times as fast as one, 1.8 times without the spinning). Null where there is no such pool.
using OpenMpRegion = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
inline OpenMpRegion open_mp_region() {
    static const auto found = reinterpret_cast<OpenMpRegion>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
}

// Runs work() on so many threads, this one included.
template <class Work>
void on_threads(std::int64_t threads, Work& work) {
    if (threads > 1 && open_mp_region() != nullptr) {
        const auto call = [](void* context) { (*static_cast<Work*>(context))(); };
        return open_mp_region()(call, &work, static_cast<unsigned>(threads), 0);
    }
    std::vector<std::thread> others;  // for one call: a pool of our own would be lost in a forked process and hang it
    try {
        for (std::int64_t i = 1; i < threads; ++i) others.emplace_back([&work] { work(); });
    } catch (const std::system_error&) {
        // The system has no thread left: the rows are taken by those there are.
    }
    work();
    for (std::thread& other : others) other.join();
}

// Calls work(r) for every row. `elements` is the size of a row; below kWorthAThread a thread costs more than it does.
template <class Work>
void for_each_row(std::int64_t rows, std::int64_t elements, int threads, const Work& work) {
    constexpr std::int64_t kWorthAThread = 1 << 17;
    const std::int64_t chunk = std::max<std::int64_t>(1, kWorthAThread / 4 / std::max<std::int64_t>(elements, 1));
    std::atomic<std::int64_t> next{0};
    auto take_rows = [&] {
        for (;;) {
            const std::int64_t begin = next.fetch_add(chunk);
            if (begin >= rows) return;
            for (std::int64_t r = begin; r < std::min(rows, begin + chunk); ++r) work(r);
        }
    };
    const std::int64_t useful = std::min(rows * elements / kWorthAThread, (rows + chunk - 1) / chunk);
    on_threads(std::clamp<std::int64_t>(useful, 1, std::max(threads, 1)), take_rows);
}

}  // namespace gft::cpu
