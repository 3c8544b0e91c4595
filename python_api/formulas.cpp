// F1 to F7 of csrc/gft/formulas.h on single numbers, for the test that holds the C++ and Python texts together.
#include "gft/formulas.h"

#include <pybind11/pybind11.h>

#include <utility>

#include "python_api/bindings.h"

namespace py = pybind11;

namespace gft::python_api {
namespace {

template <class Real>
void bind_reals(py::module_ m) {
    m.def("transform", &transform<Real>);
    m.def("transform_slope", &transform_slope<Real>);
    m.def("observe", [](Real top, Real mass, Real logit) {
        const State<Real> state = observe(State<Real>{top, mass}, logit);
        return std::make_pair(state.top, state.mass);
    });
    m.def("merge", [](Real top_a, Real mass_a, Real top_b, Real mass_b) {
        const State<Real> state = merge(State<Real>{top_a, mass_a}, State<Real>{top_b, mass_b});
        return std::make_pair(state.top, state.mass);
    });
    m.def("log_prob", [](Real logit, Real top, Real mass) { return log_prob(logit, State<Real>{top, mass}); });
    m.def("raise_gap", &raise_gap<Real>);
    m.def("row_tau", &row_tau<Real>);
    m.def("coefficient", &coefficient<Real>);
    m.def("shaped_prob", &shaped_prob<Real>);
    m.def("rectified_coefficient", &rectified_coefficient<Real>);
    m.def("shaped_coefficient", &shaped_coefficient<Real>);
    m.def("uncertainty", &uncertainty<Real>);
    m.def("entropy_coefficient", &entropy_coefficient<Real>);
    m.def("group_advantage", &group_advantage<Real>);
    m.def("log_ratio", &log_ratio<Real>);
    m.def("is_clipped", &is_clipped<Real>);
    m.def("clipped_coefficient", &clipped_coefficient<Real>);
    m.def("clipped_loss", &clipped_loss<Real>);
    m.def("capped_coefficient", &capped_coefficient<Real>);
    m.def("gated_coefficient", &gated_coefficient<Real>);
    m.def("gated_loss", &gated_loss<Real>);
    m.def("kl_loss", &kl_loss<Real>);
    m.def("kl_kappa", &kl_kappa<Real>);
    m.def("kappa", &kappa<Real>);
    m.def("token_loss", &token_loss<Real>);
    m.def("weighed", &weighed<Real>);
    m.def("dlogit_other", &dlogit_other<Real>);
    m.def("dlogit_target", &dlogit_target<Real>);
    m.def("dlogit_tilted", &dlogit_tilted<Real>);
    m.def("row_size", &row_size<Real>);
    m.def("entropy", &entropy<Real>);
}

}  // namespace

void bind_formulas(py::module_& m) {
    bind_reals<double>(m.def_submodule("formulas64", "F1 to F7 in float64."));
    bind_reals<float>(m.def_submodule("formulas32", "F1 to F7 in float32."));
}

}  // namespace gft::python_api
