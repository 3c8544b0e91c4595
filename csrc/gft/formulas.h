// The mathematics of GFT, F1 to F7, once for C++: host and device, the twin of gft_kernels/formulas.py.
//
// Templates over the real type (float or double). Logits and log-probabilities are in nats.
// Structs hold no member functions, so that no inline code with external linkage leaves a translation unit (args.h).
#pragma once

#include <cmath>

#include "gft/args.h"

namespace gft {

template <class Real>
struct State {  // a running softmax: mass counts in units of e^top; neutral element (-inf, 0)
    Real top, mass;
};

template <class Real>
struct Group {       // the rewards of one group by their distance from one of them, whose digits they share
    Real origin;     // that reward
    Real mean, std;  // of the distances; std with Bessel's correction, unused for a group of one
    std::int64_t size;
    bool equal;  // all rewards are the same number
};

template <class Real>
struct RowTerms {
    Real coefficient;  // C(pi), or what another surrogate has in its place
    Real kappa;        // A * coefficient, and what a penalty adds
    Real loss;
};

template <class Real>
GFT_HD Real neg_inf() {
    return Real(-INFINITY);
}

// NaN stays NaN.
template <class Real>
GFT_HD Real larger(Real a, Real b) {
    return a > b || a != a ? a : b;
}

// The logit the loss sees: scale, then softcap c*tanh(z/c) (softcap 0: none), then divide by the temperature.
template <class Real>
GFT_HD Real transform(Real logit, Real logit_scale, Real softcap, Real temperature) {
    Real scaled = logit * logit_scale;
    if (softcap != Real(0)) scaled = softcap * std::tanh(scaled / softcap);
    return scaled / temperature;
}

// d transform / d logit, the chain rule's factor in F7. With a softcap, 1 - tanh^2 is formed as 4e / (1 + e)^2 with
// e = exp(-2|x|): near saturation the difference has no digits.
template <class Real>
GFT_HD Real transform_slope(Real logit, Real logit_scale, Real softcap, Real temperature) {
    const Real slope = logit_scale / temperature;
    if (softcap == Real(0)) return slope;
    const Real decay = std::exp(Real(-2) * std::fabs(logit * logit_scale / softcap));
    return slope * Real(4) * decay / ((Real(1) + decay) * (Real(1) + decay));
}

// F2: two states into one. A commutative monoid; both empty: the anchor is 0, so e^(-inf - 0) = 0 and not NaN.
template <class Real>
GFT_HD State<Real> merge(State<Real> a, State<Real> b) {
    const Real top = larger(a.top, b.top);
    const Real anchor = top == neg_inf<Real>() ? Real(0) : top;
    return {top, a.mass * std::exp(a.top - anchor) + b.mass * std::exp(b.top - anchor)};
}

// F1: the state after one more logit.
template <class Real>
GFT_HD State<Real> observe(State<Real> state, Real logit) {
    return merge(state, State<Real>{logit, Real(1)});
}

// The sum of e^(z - top)*(z - top), what entropy needs, after the top has risen; drop = old top - new top <= 0. An
// empty state or a banned token has drop = -inf and adds nothing.
template <class Real>
GFT_HD Real raise_gap(Real gap, Real mass, Real drop) {
    const Real share = std::exp(drop);
    return share == Real(0) ? Real(0) : share * (gap + mass * drop);
}

// F3: log pi = -softplus(d), d = (top - z_y) + log mass over the other tokens' state. The target is kept out of the
// running state: added to it, its 1 would swallow the digits that pi near 1 lives on. A common offset cancels in top -
// z_y first. A target of +inf is an overflow, not a certainty: NaN.
template <class Real>
GFT_HD Real log_prob(Real target_logit, State<Real> others) {
    if (target_logit == -neg_inf<Real>()) return neg_inf<Real>() - neg_inf<Real>();
    const Real d = (others.top - target_logit) + std::log(others.mass);
    return -((d > Real(0) ? d : Real(0)) + std::log1p(std::exp(-std::fabs(d))));
}

// The threshold of a row: Rectify::positive spares rows with A <= 0, which is tau = 0 there.
template <class Real>
GFT_HD Real row_tau(Real advantage, Real tau, bool rectify_all) {
    return advantage > Real(0) || rectify_all ? tau : Real(0);
}

// F4: C(pi) = pi if pi < tau else 1. tau = 0 is SFT, tau = 1 is DFT; a NaN stays a NaN.
template <class Real>
GFT_HD Real coefficient(Real log_pi, Real tau) {
    return log_pi >= std::log(tau) ? Real(1) : std::exp(log_pi);
}

// pi / (pi + gamma), which bounds a push away from rare tokens: 1 where gamma = 0, and else 0 where pi = 0. Formed from
// e^-log pi, of which float32 holds 85 nats.
template <class Real>
GFT_HD Real shaped_prob(Real log_pi, Real gamma) {
    if (log_pi == neg_inf<Real>() && gamma > Real(0)) return Real(0);
    return Real(1) / (Real(1) + gamma * std::exp(log_pi < Real(-85) ? Real(85) : -log_pi));
}

// F4 of gft with its choices: C(pi) where A > 0, or everywhere; elsewhere 1 (gamma = 0), or pi / (pi + gamma).
template <class Real>
GFT_HD Real rectified_coefficient(Real log_pi, Real advantage, Real tau, bool rectify_all, Real gamma) {
    if (gamma > Real(0) && !(advantage > Real(0) || rectify_all)) return shaped_prob(log_pi, gamma);
    return coefficient(log_pi, row_tau(advantage, tau, rectify_all));
}

// F4 of luffy, the slope of pi / (pi + gamma) by log pi: gamma*pi / (pi + gamma)^2.
template <class Real>
GFT_HD Real shaped_coefficient(Real log_pi, Real gamma) {
    const Real shaped = shaped_prob(log_pi, gamma);
    return shaped * (Real(1) - shaped);
}

// F4 of chord: phi = pi*(1 - pi), the variance of the token.
template <class Real>
GFT_HD Real uncertainty(Real log_pi) {
    return -std::exp(log_pi) * std::expm1(log_pi);
}

// F4 of eaft: (H / log 20)^power, at most 1. log 20 is the entropy of 20 tokens alike, which the paper measures by.
template <class Real>
GFT_HD Real entropy_coefficient(Real entropy, Real power) {
    const Real share = entropy / Real(2.995732273553991);
    return share > Real(1) ? Real(1) : std::exp(power * std::log(share));
}

// F5: A = (R - mean) / (std + eps), exactly 0 where the group has no spread, or one that rounds to 0.
template <class Real>
GFT_HD Real group_advantage(Real reward, Real mean, Real std, Real eps) {
    return std == Real(0) ? Real(0) : (reward - mean) / (std + eps);
}

// F5 with its choices. Equal rewards give exactly 0: decided by comparing them, not by a standard deviation of 1e-10.
template <class Real>
GFT_HD Real advantage_in_group(Real reward, Group<Real> group, Real eps, Normalize normalize, Singleton singleton) {
    if (group.size == 1) return singleton == Singleton::reward ? reward : Real(0);
    if (group.equal) return Real(0);
    const Real apart = reward - group.origin;
    if (normalize == Normalize::std) return group_advantage(apart, group.mean, group.std, eps);
    const Real centred = apart - group.mean;
    if (normalize == Normalize::mean) return centred;
    return centred * (Real(group.size) / Real(group.size - 1));  // R minus the mean of the others
}

// log(a / b), 0 where they are equal, also where both are 0.
template <class Real>
GFT_HD Real log_ratio(Real log_a, Real log_b) {
    return log_a == log_b ? Real(0) : log_a - log_b;
}

// Whether a bound holds rho: A would push it further out, or A < 0 and rho > delta. At a bound itself it does not.
// delta, the dual clip, is beyond 1 + clip_high; inf: none.
template <class Real>
GFT_HD bool is_clipped(Real ratio, Real advantage, Real clip_low, Real clip_high, Real delta) {
    if (advantage > Real(0)) return ratio > Real(1) + clip_high;
    return advantage < Real(0) && (ratio < Real(1) - clip_low || ratio > delta);
}

// F4 of grpo: rho, 0 where a bound holds it.
template <class Real>
GFT_HD Real clipped_coefficient(Real ratio, Real advantage, Real clip_low, Real clip_high, Real delta) {
    return is_clipped(ratio, advantage, clip_low, clip_high, delta) ? Real(0) : ratio;
}

// F6 of grpo: -min(min(rho, delta)*A, clip(rho)*A), exactly 0 where A = 0.
template <class Real>
GFT_HD Real clipped_loss(Real ratio, Real advantage, Real clip_low, Real clip_high, Real delta) {
    if (advantage == Real(0)) return Real(0);
    if (!is_clipped(ratio, advantage, clip_low, clip_high, delta)) return -advantage * ratio;
    if (advantage > Real(0)) return -advantage * (Real(1) + clip_high);
    return -advantage * (ratio > Real(1) ? delta : Real(1) - clip_low);
}

// F4 of cispo: rho held in [1 - clip_low, 1 + clip_high]; a NaN stays a NaN.
template <class Real>
GFT_HD Real capped_coefficient(Real ratio, Real clip_low, Real clip_high) {
    const Real capped = ratio > Real(1) + clip_high ? Real(1) + clip_high : ratio;
    return capped < Real(1) - clip_low ? Real(1) - clip_low : capped;
}

// F4 of sapo: rho*4s(1 - s), s = 1 / (1 + e^-x), x = gate*(rho - 1); 0 where the gate is shut, also at rho = inf.
template <class Real>
GFT_HD Real gated_coefficient(Real ratio, Real advantage, Real gate_positive, Real gate_negative) {
    const Real gate = advantage > Real(0) ? gate_positive : gate_negative;
    const Real decay = std::exp(-std::fabs(gate * (ratio - Real(1))));
    return decay == Real(0) ? Real(0) : ratio * (Real(4) * decay / ((Real(1) + decay) * (Real(1) + decay)));
}

// F6 of sapo: -A*(4 / gate)*s, exactly 0 where A = 0.
template <class Real>
GFT_HD Real gated_loss(Real ratio, Real advantage, Real gate_positive, Real gate_negative) {
    const Real gate = advantage > Real(0) ? gate_positive : gate_negative;
    if (advantage == Real(0)) return Real(0);
    return Real(-4) * (advantage / gate) / (Real(1) + std::exp(-gate * (ratio - Real(1))));
}

// What an estimate of the KL adds to kappa, per unit of its weight: its slope by u = log pi_ref - log pi, held at
// u = kl_cap; inf: nowhere.
template <class Real>
GFT_HD Real kl_kappa(Real u, Real kl_cap, int estimator) {
    const Real held = u > kl_cap ? kl_cap : u;
    if (estimator == 1) return held == held ? Real(-1) : held;
    return estimator == 2 ? held : std::expm1(held);
}

// An estimate of KL(pi, pi_ref) at one token: k1 = -u, k2 = u^2 / 2, k3 = e^u - 1 - u >= 0, by number. Beyond
// u = kl_cap its tangent there goes on.
template <class Real>
GFT_HD Real kl_loss(Real u, Real kl_cap, int estimator) {
    const Real held = u > kl_cap ? kl_cap : u, slope = kl_kappa(u, kl_cap, estimator);
    Real value = held == -neg_inf<Real>() ? held : slope - held;  // +inf there, not inf - inf
    if (estimator == 1) value = -held;
    if (estimator == 2) value = Real(0.5) * held * held;
    return u > kl_cap ? value + slope * (u - held) : value;
}

// The row coefficient of the gradient, A*C(pi): all that tells one objective of the family from another.
template <class Real>
GFT_HD Real kappa(Real advantage, Real coefficient) {
    return advantage == Real(0) ? Real(0) : advantage * coefficient;
}

// F6: loss = -kappa * log pi, 0 where kappa = 0 (the limit of pi*log pi, never 0*inf).
template <class Real>
GFT_HD Real token_loss(Real log_pi, Real kappa) {
    return kappa == Real(0) ? Real(0) : -kappa * log_pi;
}

// value times weight; 0 where the weight is, whatever the value: a row that is out cannot spoil the sum.
template <class Real>
GFT_HD Real weighed(Real weight, Real value) {
    return weight == Real(0) ? Real(0) : weight * value;
}

// F4, kappa and F6 under one rule, without the penalties: the only place that knows one surrogate from another.
template <class Real>
GFT_HD RowTerms<Real> surrogate_terms(Real log_pi, Real old_log_pi, Real entropy, Real advantage, const Rule& rule) {
    const Real low = Real(rule.clip_low), high = Real(rule.clip_high), delta = Real(rule.delta);
    const Real gamma = Real(rule.gamma);
    const Real positive = Real(rule.gate_positive), negative = Real(rule.gate_negative);
    const auto ratio = [&] { return std::exp(log_ratio(log_pi, old_log_pi)); };
    const auto with_slope = [&](Real c) {  // -A*sg(c)*log pi
        const Real k = kappa(advantage, c);
        return RowTerms<Real>{c, k, token_loss(log_pi, k)};
    };
    const auto with_value = [&](Real c, Real loss) { return RowTerms<Real>{c, kappa(advantage, c), loss}; };
    switch (rule.surrogate) {
        case Surrogate::gft:
            return with_slope(
                rectified_coefficient(log_pi, advantage, Real(rule.tau), rule.rectify == Rectify::all, gamma));
        case Surrogate::grpo: {
            const Real rho = ratio();
            return with_value(clipped_coefficient(rho, advantage, low, high, delta),
                              clipped_loss(rho, advantage, low, high, delta));
        }
        case Surrogate::cispo:
            return with_slope(capped_coefficient(ratio(), low, high));
        case Surrogate::sapo: {
            const Real rho = ratio();
            return with_value(gated_coefficient(rho, advantage, positive, negative),
                              gated_loss(rho, advantage, positive, negative));
        }
        case Surrogate::luffy:
            return with_value(shaped_coefficient(log_pi, gamma), -kappa(advantage, shaped_prob(log_pi, gamma)));
        case Surrogate::chord:
            return with_slope(uncertainty(log_pi));
        case Surrogate::eaft:
            return with_slope(entropy_coefficient(entropy, Real(rule.entropy_power)));
    }
    return {Real(NAN), Real(NAN), Real(NAN)};  // no surrogate has this number
}

// F4, kappa and F6 of row r under its rule, with the penalties.
template <class Real>
GFT_HD RowTerms<Real> row_terms(Real log_pi, Real entropy, Real advantage, std::int64_t r, const Objective& o) {
    const bool given = o.given_R != nullptr && o.given_R[r] != 0;
    const Real old_log_pi = o.old_log_probs_R == nullptr ? log_pi : Real(o.old_log_probs_R[r]);
    RowTerms<Real> row = surrogate_terms(log_pi, old_log_pi, entropy, advantage, o.rules[given ? 1 : 0]);
    if (o.beta != 0.0) {
        const Real u = log_ratio(Real(o.ref_log_probs_R[r]), log_pi);
        row.kappa += Real(o.beta) * kl_kappa(u, Real(o.kl_cap), o.kl_estimator);
        row.loss += Real(o.beta) * kl_loss(u, Real(o.kl_cap), o.kl_estimator);
    }
    if (o.entropy_coef != 0.0) row.loss -= Real(o.entropy_coef) * entropy;
    return row;
}

// F7 away from the target: scale * pi_v with scale = weight*kappa; exactly 0 where scale = 0.
template <class Real>
GFT_HD Real dlogit_other(Real log_pi_v, Real scale) {
    return scale == Real(0) ? Real(0) : scale * std::exp(log_pi_v);
}

// F7 at the target: scale * (pi_y - 1), by expm1 so that pi near 1 keeps its digits.
template <class Real>
GFT_HD Real dlogit_target(Real log_pi_y, Real scale) {
    return scale == Real(0) ? Real(0) : scale * std::expm1(log_pi_y);
}

// F7 away from the target with -lambda*H in the loss: pi_v * (scale + tilt * (log pi_v + H)), tilt = weight*lambda; 0
// where pi_v = 0, never 0*inf. At the target the same with scale = 0 is added to what F7 is there.
template <class Real>
GFT_HD Real dlogit_tilted(Real log_pi_v, Real scale, Real tilt, Real entropy) {
    const Real pi_v = std::exp(log_pi_v);
    return pi_v == Real(0) ? Real(0) : pi_v * (scale + tilt * (log_pi_v + entropy));
}

// A bound of a row's F7: |pi_v - 1| <= 1, and -1 < pi_v * (log pi_v + H) <= H.
template <class Real>
GFT_HD Real row_size(Real scale, Real tilt, Real entropy) {
    return std::fabs(scale) + (tilt == Real(0) ? Real(0) : std::fabs(tilt) * (Real(1) + entropy));
}

// H = log mass - E[z - top], in nats; mean_gap is that expectation and mass the whole row's, target included.
template <class Real>
GFT_HD Real entropy(Real log_mass, Real mean_gap) {
    const Real h = log_mass - mean_gap;
    return h < Real(0) ? Real(0) : h;  // a rounding below 0 is 0; a NaN stays a NaN
}

}  // namespace gft
