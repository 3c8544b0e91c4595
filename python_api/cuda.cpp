// gft_kernels._C.cuda: csrc/cuda/launch.h for Python. A failed launch is a RuntimeError in the CUDA runtime's words.
#include "cuda/launch.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "python_api/bindings.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace gft::python_api {
namespace {

cuda::Place place_of(int device, Address stream, int cluster = 0, int clusters = 0) {
    return {device, to<void>(stream), cluster, clusters};
}

void raise_failure(const cuda::Outcome& outcome) {
    if (outcome.code == 0) return;
    throw std::runtime_error(std::string(outcome.doing) + " must succeed, got CUDA error " +
                             std::to_string(outcome.code) + ": " + outcome.message);
}

void run_rows(const RowCall& call, Address workspace, int device, Address stream, int cluster, int clusters) {
    raise_failure(cuda::run_rows(call, to<void>(workspace), place_of(device, stream, cluster, clusters)));
}

py::dict plan_rows(const LogitRows& logits, const std::optional<LogitRows>& gradient, bool entropy, int device) {
    const cuda::RowShape shape{
        row_count(logits), logits.V, logits.dtype, gradient.has_value(), gradient.value_or(logits).dtype, entropy};
    const cuda::LaunchPlan plan = cuda::plan_rows(shape, place_of(device, 0));
    return py::dict("kernel"_a = plan.kernel, "cluster"_a = plan.cluster, "threads"_a = plan.threads,
                    "shared_bytes"_a = plan.shared_bytes, "resident"_a = plan.resident, "grid"_a = plan.grid,
                    "refused"_a = plan.refused.code == 0 ? nullptr : plan.refused.message);
}

py::dict versions() {
    const cuda::Versions found = cuda::versions();
    return py::dict("runtime"_a = found.runtime, "driver"_a = found.driver);
}

void scale_rows(const LogitRows& gradient, const LogitRows& out, Address row_scale_R, Address upstream,
                bool upstream_per_row, int device, Address stream) {
    raise_failure(cuda::scale_rows(gradient, out, to<const float>(row_scale_R), to<const float>(upstream),
                                   upstream_per_row, place_of(device, stream)));
}

void shard_statistics(const Shard& shard, Address read_R, Address top_R, Address mass_R, Address gap_R,
                      Address target_logit_R, int device, Address stream) {
    const ShardStatistics<float> out{to<float>(top_R), to<float>(mass_R), to<float>(gap_R), to<float>(target_logit_R)};
    raise_failure(cuda::shard_statistics(shard, to<const std::uint8_t>(read_R), out, place_of(device, stream)));
}

void shard_gradient(const Shard& shard, const AgreedRows& agreed, const LogitRows& out, int device, Address stream) {
    raise_failure(cuda::shard_gradient(shard, agreed, out, place_of(device, stream)));
}

}  // namespace

void bind_cuda(py::module_& parent) {
    auto m = parent.def_submodule("cuda", "The CUDA kernels. Everything is queued on `stream`; nothing waits.");
    const auto unlocked = py::call_guard<py::gil_scoped_release>();
    m.def("absent", &cuda::absent, "Why no kernel can run on this machine; None: one can.");
    m.def("unfit", &cuda::unfit, "device"_a, "Why this device cannot run the kernels; None: it can.");
    m.def("versions", &versions,
          "The CUDA runtime linked in, and the newest that the driver here serves; 13000 is 13.0.");
    m.def("plan_rows", &plan_rows, "logits"_a, py::kw_only(), "gradient"_a, "entropy"_a, "device"_a,
          "How run_rows launches the kernel that reads the logits, and what the device refused before.");
    m.def("workspace_bytes", &cuda::workspace_bytes, "call"_a, "Scratch memory that run_rows needs for a call.");
    m.def("run_rows", &run_rows, unlocked, "call"_a, py::kw_only(), "workspace"_a, "device"_a, "stream"_a,
          "cluster"_a = 0, "clusters"_a = 0,
          "Loss, statistics and gradient of a call. For tests: blocks of a cluster, and how many clusters at most.");
    m.def("scale_rows", &scale_rows, unlocked, py::kw_only(), "gradient"_a, "out"_a, "row_scale_R"_a, "upstream"_a,
          "upstream_per_row"_a, "device"_a, "stream"_a, "out = gradient * row_scale * upstream, rounded once.");
    m.def("shard_statistics", &shard_statistics, unlocked, "shard"_a, py::kw_only(), "read_R"_a, "top_R"_a, "mass_R"_a,
          "gap_R"_a, "target_logit_R"_a, "device"_a, "stream"_a,
          "A vocabulary shard's part of each row's softmax (float32), without the target.");
    m.def("shard_gradient", &shard_gradient, unlocked, "shard"_a, py::kw_only(), "agreed"_a, "out"_a, "device"_a,
          "stream"_a, "F7 on a vocabulary shard.");
}

}  // namespace gft::python_api
