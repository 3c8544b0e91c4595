// Who gets what, before the logits are touched: group-normalised advantages (F5), live rows, each row's weight. And the
// sum after it. Small kernels over S responses or R rows; nothing here is read back by the host.
#pragma once

#include "cuda/softmax.cuh"
#include "gft/formulas.h"

namespace gft::cuda {

constexpr int kCreditThreads = 256;
constexpr int kSumThreads = 1024;
constexpr int kRunRows = 16;  // consecutive rows a thread counts before it adds to a response's counter

struct CreditTask {
    Credit credit;
    float* advantages_S;  // written from rewards_S where those are given
    int* live_S;          // sequence-mean: live rows of each response; zero at the start
    float* items;         // (): the denominator where the caller gives none
    float* advantages_R;
    float* weights_R;
};

GFT_DEVICE bool is_live(const Credit& credit, std::int64_t r) {
    return credit.targets_R[r] != credit.ignore_index && (credit.mask_R == nullptr || credit.mask_R[r] != 0);
}

GFT_DEVICE std::int64_t response_of(const Credit& credit, std::int64_t r) {
    return credit.sequence_ids_R != nullptr ? credit.sequence_ids_R[r] : r / credit.tokens_per_response;
}

// F5, a warp a response: the lanes walk through the members of its group, in doubles and by their distance from its
// reward.
GFT_KERNEL(kCreditThreads, 1) advantages_of_rewards(const CreditTask task) {
    const Credit& credit = task.credit;
    const int lane = thread_index() % kWarp;
    const std::int64_t s = block_index() * (thread_count() / kWarp) + thread_index() / kWarp;
    if (s >= credit.S) return;
    const bool consecutive = credit.group_size > 0;
    const std::int64_t start = consecutive ? s / credit.group_size * credit.group_size : 0;
    const std::int64_t stop = consecutive ? at_most(start + credit.group_size, credit.S) : credit.S;
    const auto member = [&](std::int64_t i) { return consecutive || credit.group_ids_S[i] == credit.group_ids_S[s]; };

    const double reward = credit.rewards_S[s];
    double sum = 0.0;
    int size = 0, different = 0;
    for (std::int64_t i = start + lane; i < stop; i += kWarp) {
        if (!member(i)) continue;
        sum += credit.rewards_S[i] - reward;
        size += 1;
        different += credit.rewards_S[i] != reward;  // a NaN differs from itself and spoils its group
    }
    Group<double> group{};
    group.origin = reward;
    group.size = sum_lanes(size);
    group.equal = sum_lanes(different) == 0;
    group.mean = sum_lanes(sum) / static_cast<double>(group.size);
    double squares = 0.0;
    for (std::int64_t i = start + lane; i < stop; i += kWarp) {
        const double centred = (credit.rewards_S[i] - reward) - group.mean;
        if (member(i)) squares += centred * centred;
    }
    group.std = sqrt(sum_lanes(squares) / static_cast<double>(group.size > 1 ? group.size - 1 : 1));
    if (lane == 0)
        task.advantages_S[s] =
            static_cast<float>(advantage_in_group(reward, group, credit.eps, credit.normalize, credit.singleton));
}

// Live rows of each response. A thread takes a run of rows and adds once for each response in it.
GFT_KERNEL(kCreditThreads, 1) count_live_rows(const CreditTask task) {
    const std::int64_t first = (block_index() * thread_count() + thread_index()) * kRunRows;
    std::int64_t response = -1;
    int live = 0;
    for (std::int64_t r = first; r < first + kRunRows && r < task.credit.R; ++r) {
        const std::int64_t of_row = response_of(task.credit, r);
        if (of_row != response) {
            if (live > 0) add_count(task.live_S + response, live);
            response = of_row;
            live = 0;
        }
        live += of_row >= 0 && of_row < task.credit.S && is_live(task.credit, r);
    }
    if (live > 0) add_count(task.live_S + response, live);
}

// One block. Token-mean: live rows; sequence-mean: responses with a live row. At least 1.
GFT_KERNEL(kSumThreads, 1) count_items(const CreditTask task) {
    const Credit& credit = task.credit;
    const bool tokens = credit.reduction == Reduction::token_mean;
    int items = 0;
    for (std::int64_t i = thread_index(); i < (tokens ? credit.R : credit.S); i += thread_count())
        items += tokens ? is_live(credit, i) : task.live_S[i] > 0;
    items = sum_block(items, reinterpret_cast<int*>(shared_memory()));
    if (thread_index() == 0) *task.items = static_cast<float>(items > 1 ? items : 1);
}

GFT_DEVICE float advantage_of_row(const CreditTask& task, std::int64_t r) {
    const Credit& credit = task.credit;
    if (credit.advantages_R != nullptr) return credit.advantages_R[r];
    const float* advantages_S = credit.rewards_S != nullptr ? task.advantages_S : credit.advantages_S;
    if (advantages_S == nullptr) return 1.0f;
    const std::int64_t s = response_of(credit, r);
    return s >= 0 && s < credit.S ? advantages_S[s] : NAN;  // an id that names no response spoils its row
}

GFT_DEVICE float weight_of_row(const CreditTask& task, std::int64_t r) {
    const Credit& credit = task.credit;
    const float given = credit.weights_R != nullptr ? credit.weights_R[r] : 1.0f;
    if (credit.reduction == Reduction::sum || credit.reduction == Reduction::none) return given;
    const float items = credit.num_items != nullptr ? *credit.num_items : *task.items;
    if (credit.reduction == Reduction::token_mean) return given / items;
    const std::int64_t s = response_of(credit, r);
    return s >= 0 && s < credit.S ? given / (static_cast<float>(task.live_S[s]) * items) : NAN;
}

// A[r] and w[r]; both 0 on masked rows.
GFT_KERNEL(kCreditThreads, 1) credit_rows(const CreditTask task) {
    const std::int64_t r = block_index() * thread_count() + thread_index();
    if (r >= task.credit.R) return;
    const bool live = is_live(task.credit, r);
    task.advantages_R[r] = live ? advantage_of_row(task, r) : 0.0f;
    task.weights_R[r] = live ? weight_of_row(task, r) : 0.0f;
}

// One block: the loss, summed in doubles and always in the same order.
GFT_KERNEL(kSumThreads, 1) sum_losses(const float* loss_R, const std::int64_t rows, float* loss) {
    double sum = 0.0;
    for (std::int64_t r = thread_index(); r < rows; r += thread_count()) sum += loss_R[r];
    sum = sum_block(sum, reinterpret_cast<double*>(shared_memory()));
    if (thread_index() == 0) *loss = static_cast<float>(sum);
}

}  // namespace gft::cuda
