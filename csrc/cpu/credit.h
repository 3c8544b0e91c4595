// Who gets what: advantages from rewards and groups (F5), and each row's weight under the reduction.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "gft/args.h"
#include "gft/formulas.h"

namespace gft::cpu {

struct RowCredit {
    bool live;
    float advantage;  // 0 on rows that are not live
    double weight;
};

// The rewards of responses order[begin..end), which share a group.
inline Group<double> describe(const double* rewards_S, const std::vector<std::int64_t>& order, std::int64_t begin,
                              std::int64_t end) {
    const double first = rewards_S[order[begin]];
    double sum = 0.0;
    bool equal = true;
    for (std::int64_t i = begin; i < end; ++i) {
        sum += rewards_S[order[i]] - first;
        equal = equal && rewards_S[order[i]] == first;
    }
    const double size = static_cast<double>(end - begin), mean = sum / size;
    double squares = 0.0;
    for (std::int64_t i = begin; i < end; ++i) {
        const double centred = (rewards_S[order[i]] - first) - mean;
        squares += centred * centred;
    }
    return {first, mean, std::sqrt(squares / std::max(size - 1.0, 1.0)), end - begin, equal};
}

// (S) float32 advantages of (S) rewards. Exactly 0 in a group of equal rewards.
inline std::vector<float> group_advantages(const Credit& credit) {
    std::vector<std::int64_t> order(static_cast<std::size_t>(credit.S));
    std::iota(order.begin(), order.end(), 0);
    const auto group_of = [&](std::int64_t s) {
        return credit.group_size > 0 ? s / credit.group_size : credit.group_ids_S[s];
    };
    if (credit.group_size <= 0) {
        std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return group_of(a) < group_of(b); });
    }
    std::vector<float> advantages(order.size());
    for (std::int64_t begin = 0, end = 0; begin < credit.S; begin = end) {
        while (end < credit.S && group_of(order[end]) == group_of(order[begin])) ++end;
        const Group<double> group = describe(credit.rewards_S, order, begin, end);
        for (std::int64_t i = begin; i < end; ++i) {
            const double reward = credit.rewards_S[order[i]];
            advantages[order[i]] =
                static_cast<float>(advantage_in_group(reward, group, credit.eps, credit.normalize, credit.singleton));
        }
    }
    return advantages;
}

inline bool is_live(const Credit& credit, std::int64_t r) {
    return credit.targets_R[r] != credit.ignore_index && (credit.mask_R == nullptr || credit.mask_R[r] != 0);
}

// -1 where a row's id names no response: such a row is NaN, and no other (checks.py has refused it by name before).
inline std::int64_t response_of(const Credit& credit, std::int64_t r) {
    const std::int64_t s = credit.sequence_ids_R != nullptr ? credit.sequence_ids_R[r] : r / credit.tokens_per_response;
    return s >= 0 && s < credit.S ? s : -1;
}

inline void weigh_by_token(const Credit& credit, std::vector<RowCredit>& rows) {
    const auto live = std::count_if(rows.begin(), rows.end(), [](const RowCredit& row) { return row.live; });
    const double items =
        credit.num_items != nullptr ? *credit.num_items : static_cast<double>(std::max<std::int64_t>(live, 1));
    for (RowCredit& row : rows) row.weight /= items;
}

// A row weighs 1/(live rows of its response * n), with n responses that have a live row.
inline void weigh_by_response(const Credit& credit, std::vector<RowCredit>& rows) {
    std::vector<std::int64_t> live_S(static_cast<std::size_t>(credit.S), 0);
    for (std::int64_t r = 0; r < credit.R; ++r) {
        const std::int64_t response = response_of(credit, r);
        if (rows[r].live && response >= 0) ++live_S[response];
    }
    const std::int64_t counted = credit.S - std::count(live_S.begin(), live_S.end(), 0);
    const double items =
        credit.num_items != nullptr ? *credit.num_items : static_cast<double>(std::max<std::int64_t>(counted, 1));
    for (std::int64_t r = 0; r < credit.R; ++r) {
        if (!rows[r].live) continue;
        const std::int64_t response = response_of(credit, r);
        rows[r].weight = response < 0 ? double{NAN} : rows[r].weight / (static_cast<double>(live_S[response]) * items);
    }
}

// One entry per row.
inline std::vector<RowCredit> credit_rows(const Credit& credit) {
    std::vector<float> normalised;
    if (credit.rewards_S != nullptr) normalised = group_advantages(credit);
    const float* advantages_S = credit.rewards_S != nullptr ? normalised.data() : credit.advantages_S;
    const auto advantage_of = [&](std::int64_t r) {
        if (credit.advantages_R != nullptr) return credit.advantages_R[r];
        if (advantages_S == nullptr) return 1.0f;
        const std::int64_t response = response_of(credit, r);
        return response < 0 ? NAN : advantages_S[response];
    };
    std::vector<RowCredit> rows(static_cast<std::size_t>(credit.R), {false, 0.0f, 0.0});
    for (std::int64_t r = 0; r < credit.R; ++r) {
        if (is_live(credit, r)) rows[r] = {true, advantage_of(r), credit.weights_R ? credit.weights_R[r] : 1.0};
    }
    if (credit.reduction == Reduction::token_mean) weigh_by_token(credit, rows);
    if (credit.reduction == Reduction::sequence_mean) weigh_by_response(credit, rows);
    return rows;
}

}  // namespace gft::cpu
