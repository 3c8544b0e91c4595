// Groups of any size in any order, the reductions' weights, and ids that name no response.
#include "check.h"
#include "cpu/credit.h"

namespace {

using namespace gft;

Credit packed(std::int64_t S, std::int64_t R, const std::int64_t* targets, const std::int64_t* responses) {
    Credit credit{};
    credit.S = S;
    credit.R = R;
    credit.targets_R = targets;
    credit.sequence_ids_R = responses;
    credit.tokens_per_response = R;
    credit.eps = 1e-6;
    credit.ignore_index = -100;
    return credit;
}

void test_ragged_groups() {
    const double rewards[] = {1.0, 5.0, 0.0, 0.3, 0.3, 0.3};
    const std::int64_t ids[] = {-7, 40, -7, 3, 3, 3};
    Credit credit = packed(6, 0, nullptr, nullptr);
    credit.rewards_S = rewards;
    credit.group_ids_S = ids;
    const auto advantages = cpu::group_advantages(credit);
    CHECK(is_near(advantages[0], 0.5 / (std::sqrt(0.5) + 1e-6), 1e-6));
    CHECK(is_near(advantages[2], -0.5 / (std::sqrt(0.5) + 1e-6), 1e-6));
    CHECK(advantages[1] == 5.0f);  // alone
    CHECK(advantages[3] == 0.0f && advantages[4] == 0.0f && advantages[5] == 0.0f);
}

void test_weights() {
    const std::int64_t targets[] = {1, 2, -100, 0, 1}, responses[] = {2, 2, 0, 2, 0};
    Credit credit = packed(5, 5, targets, responses);
    credit.reduction = Reduction::token_mean;
    CHECK(cpu::credit_rows(credit)[0].weight == 0.25);
    credit.reduction = Reduction::sequence_mean;  // responses 0 and 2 have live rows: 1 and 3 of them
    const auto rows = cpu::credit_rows(credit);
    CHECK(is_near(rows[0].weight, 1.0 / 6, 1e-15));
    CHECK(!rows[2].live);
    CHECK(rows[4].weight == 0.5);
    const float items = 8.0f;
    credit.num_items = &items;
    CHECK(is_near(cpu::credit_rows(credit)[0].weight, 1.0 / 24, 1e-15));
}

void test_ids_of_no_response() {
    const std::int64_t targets[] = {1, -100, 9}, responses[] = {0, 77, 4};
    const float advantages[] = {1.0f, 2.0f};
    Credit credit = packed(2, 3, targets, responses);
    credit.advantages_S = advantages;
    credit.reduction = Reduction::sequence_mean;
    const auto rows = cpu::credit_rows(credit);
    CHECK(rows[0].advantage == 1.0f && rows[0].weight == 1.0 && !rows[1].live);
    CHECK(std::isnan(rows[2].advantage) && std::isnan(rows[2].weight));
}

}  // namespace

void test_credit() {
    test_ragged_groups();
    test_weights();
    test_ids_of_no_response();
}
