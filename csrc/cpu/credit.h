// Who gets what: advantages from rewards and groups (F5), and each row's weight under the reduction.
#pragma once

#include <cstdint>
#include <vector>

#include "gft/args.h"

namespace gft::cpu {

// A live row's index that points nowhere; what the caller is told about it.
struct Fault {
    enum Kind { none, target, sequence_id } kind = none;
    std::int64_t position = 0, value = 0, stop = 0;  // the value must lie in [0, stop)
};

struct RowCredit {
    bool live;
    float advantage;  // 0 on rows that are not live
    double weight;
};

// One entry per row; `fault` is set instead if a live row's target or response id is out of range.
std::vector<RowCredit> credit_rows(const Credit& credit, std::int64_t V, Fault& fault);

// (S) float32 advantages of (S) rewards. Exactly 0 in a group of equal rewards.
std::vector<float> group_advantages(const Credit& credit);

}  // namespace gft::cpu
