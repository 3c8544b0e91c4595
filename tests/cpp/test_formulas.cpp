// F1 to F7 where a formula written the plain way goes wrong.
#include "check.h"
#include "gft/formulas.h"

namespace {

using namespace gft;
constexpr double kInf = INFINITY;

template <class Real>
void test_states(Real tolerance) {
    const State<Real> empty{neg_inf<Real>(), 0};
    const State<Real> none = merge(empty, empty);
    CHECK(none.top == neg_inf<Real>() && none.mass == 0);
    const State<Real> one = observe(empty, Real(-1000));
    CHECK(one.top == -1000 && one.mass == 1);
    const State<Real> banned = observe(one, neg_inf<Real>());
    CHECK(banned.top == -1000 && banned.mass == 1);
    CHECK(std::isnan(observe(one, Real(NAN)).mass));
    // Others {0, 1}, target 2: log pi = 2 - log(1 + e + e^2).
    const State<Real> others = observe(observe(empty, Real(0)), Real(1));
    CHECK(is_near(log_prob(Real(2), others), 2 - std::log(1 + std::exp(1.0) + std::exp(2.0)), tolerance));
    // All of it moved by 1e4: the same log pi.
    const State<Real> moved = observe(observe(empty, Real(1e4)), Real(1e4 + 1));
    CHECK(is_near(log_prob(Real(1e4 + 2), moved), log_prob(Real(2), others), tolerance));
}

template <class Real>
void test_log_prob(Real tolerance) {
    CHECK(is_near(log_prob(Real(30), State<Real>{0, 1}), -std::log1p(std::exp(-30.0)), tolerance));  // pi near 1
    CHECK(is_near(log_prob(Real(-1000), State<Real>{0, 1}), -1000, tolerance));
    CHECK(log_prob(Real(5), State<Real>{neg_inf<Real>(), 0}) == 0);  // no other token
    CHECK(log_prob(neg_inf<Real>(), State<Real>{0, 1}) == neg_inf<Real>());
    CHECK(std::isnan(log_prob(neg_inf<Real>(), State<Real>{neg_inf<Real>(), 0})));
    CHECK(std::isnan(log_prob(Real(kInf), State<Real>{0, 1})));
}

void test_coefficients() {
    Objective all{}, positive{};
    all.rules[0].tau = positive.rules[0].tau = 0.7;
    positive.rules[0].rectify = Rectify::positive;
    CHECK(coefficient(std::log(0.7), 0.7) == 1.0);  // at pi = tau the weight is 1
    CHECK(coefficient(-kInf, 0.0) == 1.0);          // tau = 0 is SFT, also where pi = 0
    CHECK(coefficient(-kInf, 0.7) == 0.0);
    CHECK(std::isnan(coefficient(double{NAN}, 0.7)));
    CHECK(is_near(row_terms(std::log(0.2), 0.0, -2.0, 0, all).kappa, -0.4, 1e-15));
    CHECK(row_terms(std::log(0.2), 0.0, -2.0, 0, positive).kappa == -2.0);
    CHECK(token_loss(-kInf, 0.0) == 0.0);  // the limit of pi log pi
    CHECK(token_loss(-kInf, 1.0) == kInf);
    CHECK(dlogit_other(double{NAN}, 0.0) == 0.0 && dlogit_target(double{NAN}, 0.0) == 0.0);
    CHECK(is_near(dlogit_target(-1e-12, 2.0), -2e-12, 1e-12));
}

// grpo with everything on: rho = 2, A on both sides of its clip and 0, k3 at u = log 2, entropy 3.
void test_objectives() {
    const float old_log_probs[] = {std::log(0.1f)}, ref_log_probs[] = {std::log(0.4f)};
    Objective o{};
    o.rules[0].surrogate = Surrogate::grpo;
    o.rules[0].clip_low = o.rules[0].clip_high = 0.2;
    o.rules[0].delta = o.kl_cap = kInf;
    o.kl_estimator = 3;
    o.old_log_probs_R = old_log_probs;
    const double log_pi = std::log(0.2);
    CHECK(row_terms(log_pi, 3.0, 1.0, 0, o).kappa == 0.0);  // clipped
    CHECK(is_near(row_terms(log_pi, 3.0, 1.0, 0, o).loss, -1.2, 1e-6));
    CHECK(is_near(row_terms(log_pi, 3.0, -1.0, 0, o).kappa, -2.0, 1e-6));
    CHECK(is_near(row_terms(log_pi, 3.0, -1.0, 0, o).loss, 2.0, 1e-6));
    o.beta = 0.5;
    o.entropy_coef = 0.25;
    o.ref_log_probs_R = ref_log_probs;
    const auto penalties = row_terms(log_pi, 3.0, 0.0, 0, o);
    CHECK(is_near(penalties.kappa, 0.5 * (2.0 - 1.0), 1e-6));
    CHECK(is_near(penalties.loss, 0.5 * (2.0 - 1.0 - std::log(2.0)) - 0.25 * 3.0, 1e-6));
    o.kl_cap = 0.5;  // u = log 2 is beyond it: the tangent goes on, and kappa stays e^0.5 - 1
    const auto capped = row_terms(log_pi, 3.0, 0.0, 0, o);
    CHECK(is_near(capped.kappa, 0.5 * std::expm1(0.5), 1e-6));
    CHECK(is_near(capped.loss, 0.5 * (std::expm1(0.5) - 0.5 + std::expm1(0.5) * (std::log(2.0) - 0.5)) - 0.25 * 3.0,
                  1e-6));
    o.kl_estimator = 2;  // the tangent of u^2 / 2
    CHECK(is_near(row_terms(log_pi, 3.0, 0.0, 0, o).kappa, 0.5 * 0.5, 1e-6));
    CHECK(is_near(row_terms(log_pi, 3.0, 0.0, 0, o).loss, 0.5 * (0.125 + 0.5 * (std::log(2.0) - 0.5)) - 0.25 * 3.0,
                  1e-6));
    o.kl_cap = kInf;
    o.kl_estimator = 1;
    CHECK(is_near(row_terms(log_pi, 3.0, 0.0, 0, o).kappa, -0.5, 1e-6));
    CHECK(is_near(row_terms(log_pi, 3.0, 0.0, 0, o).loss, -0.5 * std::log(2.0) - 0.25 * 3.0, 1e-6));
    o.beta = o.entropy_coef = 0.0;
    o.rules[0].delta = 1.5;  // rho = 2
    CHECK(row_terms(log_pi, 3.0, -1.0, 0, o).kappa == 0.0);
    CHECK(is_near(row_terms(log_pi, 3.0, -1.0, 0, o).loss, 1.5, 1e-6));
    CHECK(is_near(row_terms(log_pi, 3.0, 1.0, 0, o).loss, -1.2, 1e-6));  // as before
    o.rules[0].surrogate = Surrogate::cispo;
    CHECK(is_near(row_terms(log_pi, 3.0, 2.0, 0, o).coefficient, 1.2, 1e-6));
    o.old_log_probs_R = nullptr;
    CHECK(row_terms(-kInf, 3.0, 2.0, 0, o).coefficient == 1.0);  // on-policy, also where pi = 0
    const std::uint8_t given[] = {0, 1};
    o.given_R = given;
    o.rules[1].surrogate = Surrogate::chord;
    CHECK(row_terms(log_pi, 3.0, 2.0, 0, o).coefficient == 1.0);
    CHECK(is_near(row_terms(log_pi, 3.0, 2.0, 1, o).coefficient, 0.2 * 0.8, 1e-15));
    o.rules[1].surrogate = static_cast<Surrogate>(7);  // of none
    CHECK(std::isnan(row_terms(log_pi, 3.0, 2.0, 1, o).kappa) && std::isnan(row_terms(log_pi, 3.0, 2.0, 1, o).loss));
}

void test_advantages() {
    const Group<double> group{0.25, 0.25, 0.25, 4, false}, equal{1.0, 1e-17, 1e-17, 4, true},
        single{1.0, 0.0, 0.0, 1, true};
    const auto advantage = [](double reward, Group<double> g, Normalize n, Singleton s = Singleton::reward) {
        return advantage_in_group(reward, g, 1e-6, n, s);
    };
    CHECK(is_near(advantage(1.0, group, Normalize::std), 0.5 / 0.250001, 1e-15));
    CHECK(advantage(1.0, group, Normalize::mean) == 0.5);
    CHECK(is_near(advantage(1.0, group, Normalize::leave_one_out), 0.5 * 4 / 3, 1e-15));
    CHECK(advantage(1.0, equal, Normalize::std) == 0.0);
    CHECK(advantage(1.0, single, Normalize::std) == 1.0);
    CHECK(advantage(1.0, single, Normalize::std, Singleton::zero) == 0.0);
}

void test_transforms() {
    CHECK(is_near(transform(20.0, 0.5, 30.0, 2.0), 15.0 * std::tanh(1.0 / 3.0), 1e-15));
    CHECK(transform_slope(20.0, 0.5, 0.0, 2.0) == 0.25);
    // Saturated: 1 - tanh^2 is 4 e^-40 there, which 1 - x*x cannot say.
    CHECK(is_near(transform_slope(600.0, 1.0, 30.0, 1.0), 4 * std::exp(-40.0), 1e-12));
    CHECK(raise_gap(3.0, 0.0, -kInf) == 0.0);
    CHECK(is_near(raise_gap(-1.0, 2.0, -0.5), std::exp(-0.5) * (-1.0 + 2.0 * -0.5), 1e-15));
}

}  // namespace

void test_formulas() {
    test_states<double>(1e-12);
    test_states<float>(1e-5f);
    test_log_prob<double>(1e-14);
    test_log_prob<float>(1e-6f);
    test_coefficients();
    test_objectives();
    test_advantages();
    test_transforms();
}
