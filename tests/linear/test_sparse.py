"""`filter_eps`: what may be left out of the backward products, measured against its bound and against rounding.

With the identity as head the hidden gradient *is* the gradient of the logits as the products saw it, so the bound of
docs/linear.md can be looked at itself.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from cases import DTYPES
from linear_cases import UPSTREAM, LinearProblem, assert_right, double, here, problem, relative, truth_of

from benchmarks import recorded
from gft_kernels import GFTLinearLoss, gft_linear_loss, policy_loss
from gft_kernels.data import pretrained
from gft_kernels.linear import measures, sparse

pytestmark = pytest.mark.usefixtures("on_device")
ROUNDOFF = 2.0**-8  # of bfloat16


def seen_gradient(std=3.0, vocabulary=301, responses=6, length=7, dtype=torch.float32, **options) -> LinearProblem:
    """A problem whose head is the identity."""
    case = problem(responses, length, vocabulary, vocabulary, dtype, **options)
    with torch.no_grad():
        case.hidden.mul_(std)
        case.weight.copy_(torch.eye(vocabulary))
    return case


LOUD = (1e9, 1e-9, 1.0, -1.0, 1e-4, 3e-20)
SEEN = {
    "peaked": dict(std=3.0),
    "steep": dict(std=20.0),
    "flat": dict(std=1.0),
    "temperature": dict(std=5.0, temperature=1.7),
    "softcap": dict(std=4.0, softcap=9.0),
    "bias": dict(std=3.0, bias=True),
}


@pytest.fixture(params=[(7, 3), (512, 16)], ids=["tiles of 7", "one tile"])
def tiles(request, monkeypatch):
    monkeypatch.setattr(sparse, "TILE", request.param[0])
    monkeypatch.setattr(sparse, "BLOCK", request.param[1])
    monkeypatch.setattr(sparse, "DENSE", 1.0)
    return request.param[0]


def assert_bounded(seen_RV, exact_RV, eps, tile):
    """The bound, tile by tile: root mean square over rows, whole tile, worst row; and rows that sum as they should."""
    live = exact_RV.norm(dim=1) > 0
    assert (seen_RV[~live] == 0).all()
    error, size = (seen_RV - exact_RV)[live], exact_RV[live].norm(dim=1)
    error[size < 1e-30], size[size < 1e-30] = 0.0, 1e-30  # beyond float32
    slack = eps * (1 + 1e-4) + 3e-6  # float32's own error of the gradient
    count = -(-len(size) // tile)
    for e, n in zip(error.split(-(-len(size) // count)), size.split(-(-len(size) // count)), strict=True):
        rows = e.norm(dim=1) / n
        assert rows.square().mean().sqrt() <= slack
        assert e.norm() <= slack * n.norm()
        assert rows.max() <= slack * len(n) ** 0.5
        assert (e.sum(1).abs() / n).max() <= 2e-5


@pytest.mark.parametrize("eps", [0.1, 1e-3])
@pytest.mark.parametrize("name", SEEN)
def test_what_is_left_out_is_bounded(backend, name, eps, tiles):
    case = seen_gradient(**SEEN[name])
    _, gradients = case.gradients(backend=backend, filter_eps=eps)
    _, truth = case.truth()
    seen, exact = double(gradients[0]).flatten(0, 1), double(truth[0]).flatten(0, 1)
    assert_bounded(seen, exact, eps, tiles)
    assert eps < 0.1 or name == "steep" or relative(seen, exact) > 1e-6, "it was to leave something out"
    # dW is the same gradient's, and the bias gradient is exact
    hidden = double(case.hidden).flatten(0, 1)
    assert relative(gradients[1], seen.T @ hidden) <= 3e-6
    if case.bias is not None:
        assert relative(gradients[2], truth[2]) <= 1e-5


@pytest.mark.parametrize("options", [{}, {"objective": "grpo", "entropy_coef": 0.3}, {"entropy_coef": -2.0}], ids=str)
def test_no_row_vanishes_because_another_is_loud(options, tiles):
    """Advantages over 29 orders of magnitude: each row is measured by its own size; entropy terms of both signs."""
    case = seen_gradient()
    given = {"weight": case.weight, "mask": case.mask, "reduction": "sum", "advantages": torch.tensor(LOUD), **options}

    def gradient(**kwargs):
        loss = policy_loss(case.hidden, case.targets, **given, **kwargs)
        return double(torch.autograd.grad(loss * UPSTREAM, case.hidden)[0]).flatten(0, 1)

    exact = gradient()
    assert_bounded(gradient(filter_eps=0.02), exact, 0.02, tiles)


@pytest.mark.parametrize("reduction", ["token-mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_wanted_gradient(dtype, reduction, tiles):
    case = seen_gradient(dtype=dtype)
    _, truth = case.truth(reduction=reduction)
    for wanted in ((0, 1), (0,), (1,)):
        for number, leaf in enumerate(case.leaves()):
            leaf.requires_grad_(number in wanted)
        loss = case.loss(filter_eps=0.02, reduction=reduction, chunk_rows=19)
        gradients = torch.autograd.grad((loss * UPSTREAM).sum(), [case.leaves()[i] for i in wanted])
        for number, gradient in zip(wanted, gradients, strict=True):
            assert gradient.dtype == dtype and relative(gradient, truth[number]) <= 0.02 + 2 * ROUNDOFF


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_auto_disappears_behind_rounding(dtype, monkeypatch):
    """At most an eighth of the roundoff, before the gradient's own rounding; in float32 to the bit."""
    monkeypatch.setattr(sparse, "DENSE", 1.0)
    case, asked = seen_gradient(dtype=dtype), []
    monkeypatch.setattr(sparse, "tiles_of", lambda g, eps, *a, of=sparse.tiles_of: asked.append(eps) or of(g, eps, *a))
    (_, auto), (_, exact) = case.gradients(filter_eps="auto"), case.gradients()
    if dtype == torch.float32:
        assert not asked and all(torch.equal(a, b) for a, b in zip(auto, exact, strict=True))
    else:
        assert asked == [{torch.bfloat16: 2.0**-11, torch.float16: 2.0**-14}[dtype]]
        assert relative(auto[0], exact[0]) <= 1.5 * torch.finfo(dtype).eps / 2
    assert_right(problem(4, 3, 48, 131, dtype, std=1.0), filter_eps="auto")


def test_energies_sum_to_two_in_every_tile():
    """1 of the rows, each by its own size, and 1 of the whole tile, also in the last, which is shorter."""
    gradient = torch.randn(19, 301) * torch.tensor(LOUD).repeat(4)[:19, None]
    _, energy = sparse._measure(gradient, 8, measures)
    torch.testing.assert_close(energy.sum(1), torch.full((3,), 2.0))


def test_flat_is_what_keeps_too_many_columns():
    """Of single tiles around the verdict, with ties and zeros."""
    verdicts = set()
    for size in range(2, 40):
        energy = here(torch.randint(4, (1, size)).float() / 4)
        flat = sparse._are_flat(energy, size**0.5 / 4)
        assert flat == (sparse._columns(energy, size**0.5 / 4)[0] is None)
        verdicts.add(flat)
    assert verdicts == {True, False}
    assert not sparse._are_flat(torch.ones(2, 8) * torch.tensor([[1.0], [0.0]]), 0.1), "one tile is enough"


def test_flat_rows_are_multiplied_whole(monkeypatch):
    monkeypatch.setattr(sparse, "add_products", None)  # not to be called
    seen = []
    monkeypatch.setattr(sparse, "_measure", lambda g, *a, of=sparse._measure: seen.append(len(g)) or of(g, *a))
    case = problem(6, 5, 48, 4099, std=0.5)
    (_, filtered), (_, exact) = case.gradients(filter_eps=1e-3), case.gradients()
    assert all(torch.equal(a, b) for a, b in zip(filtered, exact, strict=True))
    assert seen == [-(-int(case.live().sum()) // sparse.SAMPLED)], "every eighth row says that all are flat"


def test_dense_tiles_beside_sparse_ones(monkeypatch):
    """Flat responses, then peaked ones, then flat ones: neighbours that are dense are one product."""
    monkeypatch.setattr(sparse, "TILE", 7)
    monkeypatch.setattr(sparse, "DENSE", 0.8)
    case, targets = seen_gradient(), here(torch.arange(42).view(6, 7))
    with torch.no_grad():
        case.hidden[:2] /= 30.0
        case.hidden[4:] /= 30.0
    found = []
    monkeypatch.setattr(sparse, "tiles_of", lambda *a, of=sparse.tiles_of: found.append(of(*a)) or found[-1])
    gradients = torch.autograd.grad(
        gft_linear_loss(case.hidden, case.weight, targets, filter_eps=0.01) * UPSTREAM, (case.hidden, case.weight)
    )
    exact = torch.autograd.grad(
        gft_linear_loss(case.hidden, case.weight, targets) * UPSTREAM, (case.hidden, case.weight)
    )
    assert [tile.kept_K is None for tile in found[0]] == [True, False, False, True]
    assert found[0][0].rows == slice(0, 14)
    assert_bounded(*(double(g[0]).flatten(0, 1) for g in (gradients, exact)), 0.01, 7)
    assert relative(gradients[1], exact[1]) <= 0.01
    kept = gft_linear_loss(case.hidden, case.weight, targets, filter_eps=0.01, return_stats=True)[1].kept
    columns = [len(case.weight) if tile.kept_K is None else len(tile.kept_K) for tile in found[0]]
    rows = [tile.rows.stop - tile.rows.start for tile in found[0]]
    shares = torch.tensor([count / len(case.weight) for count in columns])  # a GPU divides by multiplying
    assert torch.equal(kept, shares.repeat_interleave(torch.tensor(rows)).view(6, 7))


def test_a_row_that_is_not_finite_is_not_hidden():
    case = seen_gradient()
    with torch.no_grad():
        case.weight[3, 3] = torch.nan
    loss = gft_linear_loss(case.hidden, case.weight, case.targets.clamp(min=0), filter_eps=0.1)
    assert torch.autograd.grad(loss, case.hidden)[0].isnan().all()


def test_the_module_and_a_compiled_call_take_it():
    case = seen_gradient()
    expected = case.gradients(filter_eps=0.05)
    given = {"mask": case.mask, "rewards": case.rewards, "group_size": 2}
    for loss_of in (GFTLinearLoss(filter_eps=0.05), torch.compile(GFTLinearLoss(filter_eps=0.05), backend="aot_eager")):
        loss = loss_of(case.hidden, case.weight, case.targets, **given)
        gradients = torch.autograd.grad(loss * UPSTREAM, case.leaves())
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected[1], strict=True))


@pytest.fixture(scope="module")
def smollm2(request):
    """Recorded hidden states, targets, advantages, and the head."""
    if request.config.getoption("--device") != "cpu":
        pytest.skip("it is compared on the CPU")
    if importlib.util.find_spec(pretrained.READY["smollm2"].module) is None:
        pytest.skip(f"SmolLM2-135M-Instruct is not installed: {pretrained.READY['smollm2'].install}")
    hidden, targets, responses = recorded.answers()
    return hidden[::2].float(), targets[::2], torch.where(responses[::2] % 2 == 0, 1.0, -0.7), recorded.head()


@pytest.mark.pretrained
def test_on_a_real_model_auto_is_below_bfloat16_rounding(smollm2):
    """Against float64: dX, its worst row, dW, and its rows of tokens that are nobody's target."""
    hidden, targets, advantages, weight = smollm2
    live = torch.ones(len(targets), dtype=torch.bool)
    weights = truth_of.row_weights(live, [0] * len(live), "token-mean")
    logits = hidden.double() @ weight.double().T
    _, exact_RV = truth_of.loss_and_gradient(logits, targets, live, advantages, weights, UPSTREAM, tau=0.7)
    truth = exact_RV @ weight.double(), exact_RV.T @ hidden.double()
    rounded_RV = exact_RV.bfloat16().double()
    rounded = rounded_RV @ weight.double(), rounded_RV.T @ hidden.double()
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    loss = gft_linear_loss(*leaves, targets, advantages=advantages, filter_eps=ROUNDOFF / 8)
    dx, dw = (double(x) for x in torch.autograd.grad(loss * UPSTREAM, leaves))
    assert relative(dx, truth[0]) <= relative(rounded[0], truth[0])
    assert relative(dw, truth[1]) <= relative(rounded[1], truth[1])
    worst, worst_rounded = (((x - truth[0]).norm(dim=1) / truth[0].norm(dim=1)).max() for x in (dx, rounded[0]))
    assert worst <= 2 * worst_rounded
    rare = torch.ones(len(weight), dtype=torch.bool)
    rare[targets] = False
    assert relative(dw[rare], truth[1][rare]) <= 0.02
    assert (dw[rare].norm(dim=1) > 0).all(), "every token gets a gradient"
