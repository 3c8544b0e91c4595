"""docs/formulas.md, sections 8 and 9: the family of objectives, and precision.

Each surrogate below is written from its own definition and differentiated by autograd; the claim is that its
gradient is kappa·(pi - 1[v = y]) with the kappa of the document's table.
"""

import math
from typing import NamedTuple

import pytest
import torch
from tiny_policy import f64
from torch.nn.functional import log_softmax

from gft_kernels import formulas, gft_loss

INF = float("inf")

LOGITS_RV = f64(
    [[2.0, -1.0, 0.5, 0.0, -3.0], [-0.7, 4.0, 0.1, 1.2, 0.3], [9.0, 0.0, -1.0, 0.5, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]]
)
TARGETS_R = torch.tensor([1, 3, 0, 2])
ROWS = torch.arange(4)
ONE_HOT_RV = torch.eye(5).double()[TARGETS_R]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# --- section 8: the family -------------------------------------------------------------------------------------------

OLD_SHIFT = [-0.6, -0.15, 0.0, 0.15, 0.6]  # log pi - log pi_old: both clips active, none, and rho = 1
LOW, HIGH, DELTA, BETA, CAP, LAMBDA = 0.2, 0.28, 1.5, 0.04, 0.3, 0.3


def clipped(rho, advantage, delta=INF):
    return -torch.minimum(rho.clamp(max=delta) * advantage, rho.clamp(1 - LOW, 1 + HIGH) * advantage)


def gate(advantage):
    return torch.where(advantage > 0, f64(1.0), f64(1.05))


def weighed(coefficient):
    """kappa of A and a coefficient of the rows."""
    return lambda r: formulas.kappa(r.a, coefficient(r))


class Rows(NamedTuple):
    """log pi, A, log pi_old and log pi_ref of each row."""

    lp: torch.Tensor
    a: torch.Tensor
    old: torch.Tensor
    ref: torch.Tensor

    @property
    def rho(self):
        return (self.lp - self.old).exp()


FAMILY = {  # name: (surrogate of the rows, differentiable in log pi; kappa of them)
    "sft": (lambda r: -r.lp, lambda r: torch.ones_like(r.lp)),
    "dft": (lambda r: -r.lp.exp().detach() * r.lp, lambda r: r.lp.exp()),
    "gft": (lambda r: -r.a * torch.where(r.lp.exp() < 0.7, r.lp.exp(), 1.0).detach() * r.lp,
            weighed(lambda r: formulas.coefficient(r.lp, f64(0.7)))),
    "grpo, dapo, dr_grpo": (lambda r: clipped(r.rho, r.a),
                            weighed(lambda r: formulas.clipped_coefficient(r.rho, r.a, LOW, HIGH, INF))),
    "the same with a dual clip": (lambda r: clipped(r.rho, r.a, DELTA),
                                  weighed(lambda r: formulas.clipped_coefficient(r.rho, r.a, LOW, HIGH, DELTA))),
    "cispo": (lambda r: -r.a * r.rho.clamp(max=1 + HIGH).detach() * r.lp,
              weighed(lambda r: formulas.capped_coefficient(r.rho, 1.0, HIGH))),
    "cispo with a floor": (lambda r: -r.a * r.rho.clamp(1 - LOW, 1 + HIGH).detach() * r.lp,
                           weighed(lambda r: formulas.capped_coefficient(r.rho, LOW, HIGH))),
    "sapo": (lambda r: -r.a * 4 / gate(r.a) * torch.sigmoid(gate(r.a) * (r.rho - 1)),
             weighed(lambda r: formulas.gated_coefficient(r.rho, r.a, 1.0, 1.05))),
    "luffy": (lambda r: -r.a * r.lp.exp() / (r.lp.exp() + 0.1),
              weighed(lambda r: formulas.shaped_coefficient(r.lp, 0.1))),
    "chord": (lambda r: -r.a * (r.lp.exp() * (1 - r.lp.exp())).detach() * r.lp,
              weighed(lambda r: formulas.uncertainty(r.lp))),
    "k3": (lambda r: BETA * ((r.ref - r.lp).exp() - 1.0 - (r.ref - r.lp)),
           lambda r: BETA * formulas.kl_kappa(r.ref - r.lp, INF, 3)),
    "k1": (lambda r: BETA * (r.lp - r.ref), lambda r: BETA * formulas.kl_kappa(r.ref - r.lp, INF, 1)),
    "k2": (lambda r: BETA * (r.lp - r.ref) ** 2 / 2, lambda r: BETA * formulas.kl_kappa(r.ref - r.lp, INF, 2)),
}  # fmt: skip


@pytest.mark.parametrize("shift", OLD_SHIFT)
@pytest.mark.parametrize("name", FAMILY)
def test_family(name, shift):
    surrogate, kappa = FAMILY[name]
    advantages_R = f64([1.3, -0.8, 0.4, -2.0])
    logits_RV = LOGITS_RV.clone().requires_grad_()
    log_pi_R = log_softmax(logits_RV, 1)[ROWS, TARGETS_R]
    old_R, ref_R = log_pi_R.detach() - shift, log_pi_R.detach() + f64([0.5, -0.4, 0.1, -1.0])
    surrogate(Rows(log_pi_R, advantages_R, old_R, ref_R)).sum().backward()
    kappa_R = kappa(Rows(log_pi_R.detach(), advantages_R, old_R, ref_R))
    close(logits_RV.grad, kappa_R[:, None] * (LOGITS_RV.softmax(1) - ONE_HOT_RV))


def test_k3_pulls_towards_the_reference():
    """A target less likely than under the reference gets kappa > 0: its logit rises."""
    kappa = FAMILY["k3"][1](Rows(f64([-3.0, -1.0]), None, None, f64([-1.0, -3.0])))
    assert kappa[0] > 0 > kappa[1]


@pytest.mark.parametrize(("estimator", "steepest"), [(2, CAP), (3, math.expm1(CAP))])
def test_a_capped_estimate_goes_on_in_a_straight_line(estimator, steepest):
    """Value and slope are continuous at the cap, the slope is that of the value everywhere, and both stay finite."""
    u = f64([-2.0, 0.2, CAP, CAP, 0.5, 5.0, 200.0])
    u[3] += 1e-9
    u.requires_grad_()
    (slope,) = torch.autograd.grad(formulas.kl_loss(u, CAP, estimator).sum(), u)
    close(slope, formulas.kl_kappa(u.detach(), CAP, estimator))
    u = u.detach()
    assert formulas.kl_loss(u[3], CAP, estimator) - formulas.kl_loss(u[2], CAP, estimator) <= 1e-9
    close(formulas.kl_loss(u[:3], CAP, estimator), formulas.kl_loss(u[:3], INF, estimator))
    close(formulas.kl_kappa(u[3:], CAP, estimator), f64(steepest).expand(4))
    far, free = (formulas.kl_loss(u[-1].float(), cap, estimator) for cap in (CAP, INF))
    assert far.isfinite() and far < free


def test_what_the_estimates_pull_on_average_of_samples():
    """Over the vocabulary: k1 not at all, k2 as the KL, k3 as the one the other way round. k1, k3 have its value."""
    for logits_V, ref_V in zip(LOGITS_RV, LOGITS_RV.roll(1, 0), strict=True):
        leaf_V = logits_V.clone().requires_grad_()
        log_pi_V, log_ref_V = log_softmax(leaf_V, 0), log_softmax(ref_V, 0)
        kl = (log_pi_V.exp() * (log_pi_V - log_ref_V)).sum()
        (pull_V,) = torch.autograd.grad(kl, leaf_V)
        pi_V, u_V = log_pi_V.detach().exp(), (log_ref_V - log_pi_V).detach()
        of = {k: pi_V * formulas.kl_kappa(u_V, INF, k) for k in (1, 2, 3)}  # each token's gradient is kappa·(pi - 1[y])
        mean_V = {k: kappa_V.sum() * pi_V - kappa_V for k, kappa_V in of.items()}
        close(mean_V[1], torch.zeros(5).double())
        close(mean_V[2], pull_V)
        close(mean_V[3], pi_V - log_ref_V.exp())  # the gradient of KL(pi_ref, pi)
        values = [(pi_V * formulas.kl_loss(u_V, INF, k)).sum() for k in (1, 2, 3)]
        close(values[0], kl.detach())
        close(values[2], kl.detach())
        assert abs(values[1] - kl.detach()) > 0.02


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_the_clip_lets_its_own_bound_through(advantage):
    """rho = 1.25 and 0.75, exactly: the value is the bound's on both sides, the gradient that of autograd's minimum."""
    for ratio in (1.25, 0.75):
        log_ratio = torch.log(f64(ratio)).requires_grad_()
        rho, a = f64(ratio) * torch.exp(log_ratio - log_ratio.detach()), f64(advantage)
        loss = -torch.minimum(rho * a, rho.clamp(0.75, 1.25) * a)
        loss.backward()
        assert not formulas.is_clipped(f64(ratio), a, 0.25, 0.25, INF)
        close(-log_ratio.grad, formulas.kappa(a, formulas.clipped_coefficient(f64(ratio), a, 0.25, 0.25, INF)))
        close(loss.detach(), formulas.clipped_loss(f64(ratio), a, 0.25, 0.25, INF))


@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 30.0])
def test_a_tilted_row_stays_within_its_bound(spread):
    """Distributions from flat to certain: no entry of F7 exceeds |scale| + |tilt|·(1 + H)."""
    log_pi_RV = log_softmax(torch.randn(64, 257, dtype=torch.float64) * spread, 1)
    entropy_R = -(log_pi_RV.exp() * log_pi_RV).sum(1)
    shape_RV = formulas.dlogit_tilted(log_pi_RV, 0.0, 1.0, entropy_R[:, None])
    assert (shape_RV > -1.0).all() and (shape_RV <= entropy_R[:, None]).all()
    for scale, tilt in ((2.0, 0.0), (-0.5, 0.3), (0.0, -1.0)):
        others_RV = formulas.dlogit_tilted(log_pi_RV, scale, tilt, entropy_R[:, None])
        target_RV = formulas.dlogit_target(log_pi_RV, f64(scale)) + tilt * shape_RV
        bound_R = formulas.row_size(f64(scale), f64(tilt), entropy_R)
        assert (torch.maximum(others_RV.abs(), target_RV.abs()) <= bound_R[:, None]).all()


def test_entropy_and_its_gradient():
    logits_RV = LOGITS_RV.clone().requires_grad_()
    log_probs_RV = log_softmax(logits_RV, 1)
    entropy_R = -(log_probs_RV.exp() * log_probs_RV).sum(1)
    (-LAMBDA * entropy_R).sum().backward()
    pi_RV, log_pi_RV = LOGITS_RV.softmax(1), log_softmax(LOGITS_RV, 1)
    close(logits_RV.grad, LAMBDA * pi_RV * (log_pi_RV + entropy_R.detach()[:, None]))

    gap_RV = LOGITS_RV - LOGITS_RV.max(1, keepdim=True).values
    mass_R = gap_RV.exp().sum(1)
    mean_gap_R = (gap_RV * gap_RV.exp()).sum(1) / mass_R
    close(formulas.entropy(mass_R.log(), mean_gap_R), entropy_R.detach())


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_the_entropy_sum_moves_with_the_top(cut):
    """Two halves of a row, each summed against its own top, the second top higher; a banned token adds nothing."""
    logits_V = f64([0.3, -1.0, 0.7, formulas.NEG_INF, 2.5, 1.0])
    gap, mass, top = f64(0.0), f64(0.0), f64(formulas.NEG_INF)
    for part_V in (logits_V[:cut], logits_V[cut:]):
        part_top = part_V.max()
        part_mass = torch.exp(part_V - part_top).sum()
        part_gap = formulas.raise_gap(f64(0.0), f64(1.0), part_V - part_top).sum()
        new_top = torch.maximum(top, part_top)
        gap = formulas.raise_gap(gap, mass, top - new_top) + formulas.raise_gap(part_gap, part_mass, part_top - new_top)
        top, mass = formulas.merge(top, mass, part_top, part_mass)
    pi_V = logits_V.softmax(0)
    close(formulas.entropy(mass.log(), gap / mass), -torch.special.xlogy(pi_V, pi_V).sum())


# --- section 9: precision --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pi", "lost"), [(0.9, 0.016), (0.99, 0.17), (0.999, 1.0)])
def test_rounding_pi_before_subtracting_one(pi, lost):
    """The share of the gradient lost: pi rounded to bf16 first, against F7 rounded once (at most 2^-8 / 2)."""
    early = 1.0 - float(torch.tensor(pi).bfloat16())
    once = -float(formulas.dlogit_target(torch.tensor(pi).log(), torch.tensor(1.0)).bfloat16())
    assert abs(early / (1.0 - pi) - 1.0) == pytest.approx(lost, abs=0.005)
    assert abs(once / (1.0 - pi) - 1.0) <= 1.1 * 2.0**-9


def test_certain_target_in_float32():
    """1 - pi = 1e-9: pi itself rounds to 1, log pi does not."""
    assert float(formulas.dlogit_target(torch.tensor(-1e-9), torch.tensor(1.0))) == pytest.approx(-1e-9, rel=1e-6)


@pytest.mark.parametrize("upstream", [2.0**16, 2.0**28])
def test_fp16_row_scale(upstream):
    """1/N = 1/8192 and C = pi = 1e-4: 1.2e-8 is below half of fp16's smallest number, so a later 65536 finds 0.

    2^28 brings the entry of a token with pi = 1e-6 into range too: the peak must be large enough to have kept it.
    """
    logits_RV = torch.tensor([[0.0, 9.21, -4.6]], dtype=torch.float16).requires_grad_()
    pi_V = logits_RV.detach().double().softmax(1)[0]
    scale = float(pi_V[0]) / 8192
    gradient_V = scale * (pi_V - f64([1.0, 0.0, 0.0]))
    assert not (gradient_V.half() * upstream).any()
    loss = gft_loss(logits_RV, torch.tensor([0]), tau=0.7, num_items_in_batch=8192)
    (loss * upstream).backward()
    torch.testing.assert_close(logits_RV.grad[0].double(), gradient_V * upstream, rtol=1.05 * 2.0**-10, atol=2.0**-25)
