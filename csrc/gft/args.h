// What a native call is given and where it writes: plain structs, the same for host and device code.
//
// Sizes: S responses, T positions per response, R = S*T rows, V vocabulary. Suffixes name shapes (rewards_S).
// Pointers are host pointers in csrc/cpu and device pointers in csrc/cuda; null says "absent". Nothing here owns
// memory.
#pragma once

#include <cstdint>

// Internal linkage on purpose: each instruction set is its own translation unit, and an inline function with external
// linkage compiled for AVX-512 could be the copy the linker keeps for every machine.
#if defined(__CUDACC__)
#define GFT_HD [[maybe_unused]] static __host__ __device__ __forceinline__
#else
#define GFT_HD [[maybe_unused]] static inline
#endif

namespace gft {

enum class Dtype : int { f32, bf16, f16 };
enum class Reduction : int { token_mean, sequence_mean, sum, none };
enum class Normalize : int { std, mean, leave_one_out };
enum class Singleton : int { reward, zero };
enum class Rectify : int { all, positive };
enum class Surrogate : int { gft, grpo, cispo, sapo, luffy, chord, eaft };

// An fp16 gradient row is stored at this size before its row scale; half the range (65504) is left free.
constexpr float kFp16Peak = 16384.0f;

// Rows of logits, or of their gradient: row r is (r / inner, r % inner); strides in elements; unit stride over V.
struct LogitRows {
    void* data;  // null in a result: not wanted
    Dtype dtype;
    std::int64_t outer, inner, V;  // R = outer * inner
    std::int64_t stride_outer, stride_inner;
};

GFT_HD std::int64_t row_count(const LogitRows& rows) { return rows.outer * rows.inner; }

// Elements from data to row r. 64 bits: R * V passes 2^31 at 14,135 rows of V = 151,936.
GFT_HD std::int64_t row_offset(const LogitRows& rows, std::int64_t r) {
    return (r / rows.inner) * rows.stride_outer + (r % rows.inner) * rows.stride_inner;
}

// Everything that decides a row's advantage A[r] and weight w[r]; no logits. All arrays are contiguous.
// At most one of rewards_S, advantages_S and advantages_R is given; with none of them A = 1.
struct Credit {
    std::int64_t S, R;
    const std::int64_t* targets_R;
    const std::uint8_t* mask_R;  // bool; null: every row whose target is not ignore_index is live
    const double* rewards_S;     // need group_size or group_ids_S; doubles, for 1e8 + 1 is not a float
    const float* advantages_S;
    const float* advantages_R;
    const float* weights_R;              // multiplied into the reduction's weight; 0: the row is out; null: 1
    const std::int64_t* group_ids_S;     // any values, any order; read where group_size is 0
    std::int64_t group_size;             // consecutive responses per group; 0: group_ids_S decide
    const std::int64_t* sequence_ids_R;  // the response of a row; null: r / tokens_per_response
    std::int64_t tokens_per_response;
    const float* num_items;  // (): the denominator; null: counted from the live rows
    Reduction reduction;
    Normalize normalize;
    Singleton singleton;
    double eps;
    std::int64_t ignore_index;
};

// How a logit becomes the logit the loss sees: scale, then softcap c*tanh(z/c) (0: none), then divide.
struct Transform {
    double logit_scale, softcap, temperature;
};

// What tells one surrogate from another: how kappa and the loss follow from log pi and A. A field that a surrogate does
// not use is not read.
struct Rule {
    Surrogate surrogate;
    Rectify rectify;
    double tau;                           // gft
    double clip_low, clip_high;           // of rho: grpo, cispo
    double delta;                         // grpo: rho above it is held there where A < 0; inf: no such bound
    double gamma;                         // luffy, and gft where it does not rectify: of pi / (pi + gamma)
    double gate_positive, gate_negative;  // sapo: how steep its gate is where A > 0, and elsewhere
    double entropy_power;                 // eaft
};

// The objective of a call: the rule of each row, and the penalties of all.
struct Objective {
    Rule rules[2];                 // of all rows; of those that given_R names
    const std::uint8_t* given_R;   // bool; null: no row is
    double beta, entropy_coef;     // weights of the KL penalty and of the entropy bonus
    double kl_cap;                 // beyond this log(pi_ref / pi) the penalty goes on in a straight line; inf: nowhere
    int kl_estimator;              // of the penalty: 1, 2, 3 are k1, k2, k3
    const float* old_log_probs_R;  // of rho; null: on-policy, rho = 1
    const float* ref_log_probs_R;  // of the KL; read where beta is not 0
};

// Where the results go. Per-row arrays are contiguous, R long.
struct RowResults {
    float* loss;  // 1, or R with Reduction::none
    float* log_probs_R;
    float* coefficients_R;
    float* advantages_R;
    float* entropy_R;    // null: not wanted
    float* row_scale_R;  // null: the gradient is final; else the gradient is stored at kFp16Peak (fp16 only)
    LogitRows gradient;  // data null: not wanted; data equal to the logits': in place
};

// Whether a row's entropy is needed, for the caller or for the loss.
GFT_HD bool needs_entropy(const Objective& objective, const float* entropy_R) {
    const bool of_rule = objective.rules[0].surrogate == Surrogate::eaft ||
                         (objective.given_R != nullptr && objective.rules[1].surrogate == Surrogate::eaft);
    return entropy_R != nullptr || objective.entropy_coef != 0.0 || of_rule;
}

// Whether a live row's logits matter: to the caller, or to the loss.
template <class Real>
GFT_HD bool is_read(float advantage, Real weight, const Objective& objective, bool read_every_row) {
    const bool acts = advantage != 0.0f || objective.beta != 0.0 || objective.entropy_coef != 0.0;
    return read_every_row || (weight != Real(0) && acts);
}

// What F7 multiplies the parts of a row by; where scale and tilt are 0 the gradient is exactly 0.
template <class Real>
struct RowScales {
    Real scale;    // weight * kappa: of pi_v - 1[v = y]
    Real tilt;     // weight * lambda: of pi_v * (log pi_v + H)
    Real entropy;  // H in nats
};

// One device's columns of every row, where a vocabulary is spread over several.
struct Shard {
    LogitRows logits;
    const std::int64_t* columns_R;  // the target's column here, or anything outside [0, V) if it lies elsewhere
    Transform transform;
};

// A shard's part of each row's softmax, without its target; nats, R long.
template <class Real>
struct ShardStatistics {
    Real* top_R;
    Real* mass_R;          // sum of e^(z - top)
    Real* gap_R;           // sum of (z - top) * e^(z - top); null: no entropy wanted
    Real* target_logit_R;  // transformed; 0 where the target lies in another shard
};

// What all shards agreed on about each whole row: its log pi, top, log mass and RowScales; R long.
struct AgreedRows {
    const float *log_pi_R, *top_R, *log_mass_R;
    const float* scale_R;
    const float *tilt_R, *entropy_R;  // null, both: no entropy bonus
};

// One loss over logits.
struct RowCall {
    LogitRows logits;
    Credit credit;
    Transform transform;
    Objective objective;
    bool read_every_row;  // live rows that the loss has no use for are read as well, for their statistics
    RowResults out;
};

}  // namespace gft
