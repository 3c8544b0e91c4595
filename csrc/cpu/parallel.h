// Rows over threads. Which thread takes a row changes nothing about its result, so neither does their number.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace gft::cpu {

// Calls work(r) for every row. Threads live for one call: a pool would be lost in a forked data loader and hang it, and
// starting one costs about the time of a row. `elements` is the size of a row; below kWorthAThread a thread costs more
// than it does.
template <class Work>
void for_each_row(std::int64_t rows, std::int64_t elements, int threads, const Work& work) {
    constexpr std::int64_t kWorthAThread = 1 << 17;
    const std::int64_t chunk = std::max<std::int64_t>(1, kWorthAThread / 4 / std::max<std::int64_t>(elements, 1));
    std::atomic<std::int64_t> next{0};
    const auto take_rows = [&] {
        for (;;) {
            const std::int64_t begin = next.fetch_add(chunk);
            if (begin >= rows) return;
            for (std::int64_t r = begin; r < std::min(rows, begin + chunk); ++r) work(r);
        }
    };
    const std::int64_t useful = std::min(rows * elements / kWorthAThread, (rows + chunk - 1) / chunk);
    std::vector<std::thread> others;
    try {
        for (std::int64_t i = 1; i < std::min<std::int64_t>(threads, useful); ++i) others.emplace_back(take_rows);
    } catch (const std::system_error&) {
        // The system has no thread left: the rows are taken by those there are.
    }
    take_rows();
    for (std::thread& other : others) other.join();
}

}  // namespace gft::cpu
