// gft_kernels._C: the C++ kernels for Python. What may cross is in README.md: addresses, sizes, strides and numbers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/loss.h"
#include "python_api/bindings.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace gft::python_api {
namespace {

// Enumerators in the order of args.h.
template <class Enum, std::size_t kCount>
Enum parse(const std::string& value, const char* argument, const std::array<const char*, kCount>& names) {
    std::string allowed;
    for (std::size_t i = 0; i < kCount; ++i) {
        if (value == names[i]) return static_cast<Enum>(i);
        allowed += std::string(i == 0 ? "" : ", ") + names[i];
    }
    throw std::invalid_argument(std::string(argument) + " must be one of " + allowed + ", got '" + value + "'");
}

constexpr std::array<const char*, 3> kDtypes{"float32", "bfloat16", "float16"};
constexpr std::array<const char*, 4> kReductions{"token-mean", "sequence-mean", "sum", "none"};
constexpr std::array<const char*, 3> kNormalize{"std", "mean", "leave-one-out"};
constexpr std::array<const char*, 2> kSingleton{"reward", "zero"};
constexpr std::array<const char*, 2> kRectify{"all", "positive"};
constexpr std::array<const char*, 7> kSurrogates{"gft", "grpo", "cispo", "sapo", "luffy", "chord", "eaft"};
static_assert(static_cast<std::size_t>(Surrogate::eaft) + 1 == kSurrogates.size());

LogitRows make_rows(Address data, const std::string& dtype, std::array<std::int64_t, 3> shape,
                    std::array<std::int64_t, 2> strides) {
    return {to<void>(data), parse<Dtype>(dtype, "dtype", kDtypes), shape[0], shape[1], shape[2], strides[0],
            strides[1]};
}

Credit make_credit(std::int64_t S, std::int64_t R, Address targets_R, Address mask_R, Address rewards_S,
                   Address advantages_S, Address advantages_R, Address weights_R, std::int64_t group_size,
                   Address group_ids_S, Address sequence_ids_R, std::int64_t tokens_per_response, Address num_items,
                   const std::string& reduction, std::int64_t ignore_index, const std::string& normalize, double eps,
                   const std::string& singleton) {
    Credit credit{};
    credit.S = S;
    credit.R = R;
    credit.targets_R = to<const std::int64_t>(targets_R);
    credit.mask_R = to<const std::uint8_t>(mask_R);
    credit.rewards_S = to<const double>(rewards_S);
    credit.advantages_S = to<const float>(advantages_S);
    credit.advantages_R = to<const float>(advantages_R);
    credit.weights_R = to<const float>(weights_R);
    credit.group_size = group_size;
    credit.group_ids_S = to<const std::int64_t>(group_ids_S);
    credit.sequence_ids_R = to<const std::int64_t>(sequence_ids_R);
    credit.tokens_per_response = tokens_per_response;
    credit.num_items = to<const float>(num_items);
    credit.reduction = parse<Reduction>(reduction, "reduction", kReductions);
    credit.ignore_index = ignore_index;
    credit.normalize = parse<Normalize>(normalize, "normalize", kNormalize);
    credit.eps = eps;
    credit.singleton = parse<Singleton>(singleton, "singleton", kSingleton);
    return credit;
}

Rule make_rule(const std::string& surrogate, double tau, const std::string& rectify, double clip_low, double clip_high,
               double delta, double gamma, double gate_positive, double gate_negative, double entropy_power) {
    return {parse<Surrogate>(surrogate, "surrogate", kSurrogates),
            parse<Rectify>(rectify, "rectify", kRectify),
            tau,
            clip_low,
            clip_high,
            delta,
            gamma,
            gate_positive,
            gate_negative,
            entropy_power};
}

Objective make_objective(const Rule& rule, const Rule& given, Address given_R, double beta, double entropy_coef,
                         double kl_cap, int kl_estimator, Address old_log_probs_R, Address ref_log_probs_R) {
    return {{rule, given},
            to<const std::uint8_t>(given_R),
            beta,
            entropy_coef,
            kl_cap,
            kl_estimator,
            to<const float>(old_log_probs_R),
            to<const float>(ref_log_probs_R)};
}

RowCall make_call(const LogitRows& logits, const Credit& credit, const Transform& transform, const Objective& objective,
                  bool read_every_row, Address loss, Address log_probs_R, Address coefficients_R, Address advantages_R,
                  Address entropy_R, Address row_scale_R, std::optional<LogitRows> gradient) {
    const RowResults out{
        to<float>(loss),      to<float>(log_probs_R), to<float>(coefficients_R),     to<float>(advantages_R),
        to<float>(entropy_R), to<float>(row_scale_R), gradient.value_or(LogitRows{})};
    return {logits, credit, transform, objective, read_every_row, out};
}

AgreedRows make_agreed(Address log_pi_R, Address top_R, Address log_mass_R, Address scale_R, Address tilt_R,
                       Address entropy_R) {
    return {to<const float>(log_pi_R), to<const float>(top_R),  to<const float>(log_mass_R),
            to<const float>(scale_R),  to<const float>(tilt_R), to<const float>(entropy_R)};
}

void bind_arguments(py::module_& m) {
    py::class_<LogitRows>(m, "LogitRows")
        .def(py::init(&make_rows), py::kw_only(), "data"_a, "dtype"_a, "shape"_a, "strides"_a);
    py::class_<Transform>(m, "Transform")
        .def(py::init([](double scale, double softcap, double temperature) {
                 return Transform{scale, softcap, temperature};
             }),
             py::kw_only(), "logit_scale"_a, "softcap"_a, "temperature"_a);
    py::class_<Credit>(m, "Credit")
        .def(py::init(&make_credit), py::kw_only(), "S"_a, "R"_a, "targets_R"_a, "mask_R"_a, "rewards_S"_a,
             "advantages_S"_a, "advantages_R"_a, "weights_R"_a, "group_size"_a, "group_ids_S"_a, "sequence_ids_R"_a,
             "tokens_per_response"_a, "num_items"_a, "reduction"_a, "ignore_index"_a, "normalize"_a, "eps"_a,
             "singleton"_a);
    py::class_<Rule>(m, "Rule").def(py::init(&make_rule), py::kw_only(), "surrogate"_a, "tau"_a, "rectify"_a,
                                    "clip_low"_a, "clip_high"_a, "delta"_a, "gamma"_a, "gate_positive"_a,
                                    "gate_negative"_a, "entropy_power"_a);
    py::class_<Objective>(m, "Objective")
        .def(py::init(&make_objective), py::kw_only(), "rule"_a, "given"_a, "given_R"_a, "beta"_a, "entropy_coef"_a,
             "kl_cap"_a, "kl_estimator"_a, "old_log_probs_R"_a, "ref_log_probs_R"_a);
    py::class_<RowCall>(m, "RowCall")
        .def(py::init(&make_call), py::kw_only(), "logits"_a, "credit"_a, "transform"_a, "objective"_a,
             "read_every_row"_a, "loss"_a, "log_probs_R"_a, "coefficients_R"_a, "advantages_R"_a, "entropy_R"_a,
             "row_scale_R"_a, "gradient"_a);
    py::class_<Shard>(m, "Shard")
        .def(py::init([](const LogitRows& logits, Address columns_R, const Transform& transform) {
                 return Shard{logits, to<const std::int64_t>(columns_R), transform};
             }),
             py::kw_only(), "logits"_a, "columns_R"_a, "transform"_a);
    py::class_<AgreedRows>(m, "AgreedRows")
        .def(py::init(&make_agreed), py::kw_only(), "log_pi_R"_a, "top_R"_a, "log_mass_R"_a, "scale_R"_a, "tilt_R"_a,
             "entropy_R"_a);
}

std::vector<std::string> instruction_sets() {
    int count = 0;
    const cpu::InstructionSet* sets = cpu::instruction_sets(count);
    std::vector<std::string> names;
    for (int i = 0; i < count; ++i) {
        if (sets[i].runs_here) names.emplace_back(sets[i].kernels->name);
    }
    return names;
}

cpu::Execution execution(const std::string& instruction_set, int threads) {
    const cpu::RowKernels* kernels = cpu::find_kernels(instruction_set.c_str());
    if (kernels != nullptr) return {kernels, threads};
    std::string names;
    for (const std::string& name : instruction_sets()) names += " " + name;
    throw std::invalid_argument("instruction_set must be one of" + names + ", got '" + instruction_set +
                                "'; leave it out for the fastest");
}

void row_loss(const RowCall& call, const std::string& instruction_set, int threads) {
    cpu::row_loss(call, execution(instruction_set, threads));
}

void group_advantages(std::int64_t S, Address rewards_S, std::int64_t group_size, Address group_ids_S,
                      const std::string& normalize, double eps, const std::string& singleton, Address advantages_S) {
    Credit credit{};
    credit.S = S;
    credit.rewards_S = to<const double>(rewards_S);
    credit.group_size = group_size;
    credit.group_ids_S = to<const std::int64_t>(group_ids_S);
    credit.normalize = parse<Normalize>(normalize, "normalize", kNormalize);
    credit.eps = eps;
    credit.singleton = parse<Singleton>(singleton, "singleton", kSingleton);
    cpu::normalise_rewards(credit, to<float>(advantages_S));
}

bool all_within(Address values, std::int64_t count, std::int64_t stop) {
    return cpu::all_within(to<const std::int64_t>(values), count, stop);
}

bool all_finite(Address values, std::int64_t count) { return cpu::all_finite(to<const float>(values), count); }

void shard_statistics(const Shard& shard, Address read_R, Address top_R, Address mass_R, Address gap_R,
                      Address target_logit_R, const std::string& instruction_set, int threads) {
    const ShardStatistics<double> out{to<double>(top_R), to<double>(mass_R), to<double>(gap_R),
                                      to<double>(target_logit_R)};
    cpu::shard_statistics(shard, to<const std::uint8_t>(read_R), out, execution(instruction_set, threads));
}

void shard_gradient(const Shard& shard, const AgreedRows& agreed, const LogitRows& out,
                    const std::string& instruction_set, int threads) {
    cpu::shard_gradient(shard, agreed, out, execution(instruction_set, threads));
}

void scale_rows(const LogitRows& gradient, const LogitRows& out, Address row_scale_R, Address upstream,
                bool upstream_per_row, const std::string& instruction_set, int threads) {
    cpu::scale_rows(gradient, out, to<const float>(row_scale_R), to<const float>(upstream), upstream_per_row,
                    execution(instruction_set, threads));
}

void bind_cpu(py::module_& m) {
    const auto unlocked = py::call_guard<py::gil_scoped_release>();
    m.def("instruction_sets", &instruction_sets, "Those of this build that this processor can run, fastest first.");
    m.def("row_loss", &row_loss, unlocked, "call"_a, py::kw_only(), "instruction_set"_a = "", "threads"_a = 1,
          "Loss, statistics and gradient of a call.");
    m.def("group_advantages", &group_advantages, unlocked, "S"_a, "rewards_S"_a, "group_size"_a, "group_ids_S"_a,
          "normalize"_a, "eps"_a, "singleton"_a, "advantages_S"_a, "Advantages of (S,) rewards (float64).");
    m.def("all_within", &all_within, "values"_a, "count"_a, "stop"_a,
          "Whether all of (count,) int64 lie in [0, stop).");
    m.def("all_finite", &all_finite, "values"_a, "count"_a, "Whether all of (count,) float32 are finite.");
    m.def("shard_statistics", &shard_statistics, unlocked, "shard"_a, py::kw_only(), "read_R"_a, "top_R"_a, "mass_R"_a,
          "gap_R"_a, "target_logit_R"_a, "instruction_set"_a = "", "threads"_a = 1,
          "A vocabulary shard's part of each row's softmax (float64), without the target.");
    m.def("shard_gradient", &shard_gradient, unlocked, "shard"_a, py::kw_only(), "agreed"_a, "out"_a,
          "instruction_set"_a = "", "threads"_a = 1, "F7 on a vocabulary shard.");
    m.def("scale_rows", &scale_rows, unlocked, py::kw_only(), "gradient"_a, "out"_a, "row_scale_R"_a, "upstream"_a,
          "upstream_per_row"_a, "instruction_set"_a = "", "threads"_a = 1,
          "out = gradient * row_scale * upstream, rounded once.");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "C++ kernels of gft_kernels. Import it through gft_kernels._extension only.";
    bind_arguments(m);
    bind_formulas(m);
    bind_cpu(m);
#if defined(GFT_WITH_CUDA)
    bind_cuda(m);
#endif
}

}  // namespace gft::python_api
