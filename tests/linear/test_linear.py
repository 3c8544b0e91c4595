"""`gft_linear_loss` against the float64 oracle on logits = hidden @ weight^T: sizes, dtypes, options, chunks."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, HALVES, TAUS, UPSTREAM, assert_loss
from linear_cases import assert_gradients, assert_right, double, here, problem, relative, truth_of

from gft_kernels import gft_linear_loss, gft_loss, token_log_probs
from gft_kernels.linear.chunks import row_buffer

pytestmark = pytest.mark.usefixtures("on_device")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("hidden_size", "vocabulary"), [(64, 50257), (64, 1000), (896, 4099), (2048, 131), (7, 1), (1, 2)]
)
def test_every_size_and_dtype(backend, hidden_size, vocabulary, dtype):
    assert_right(problem(2, 2, hidden_size, vocabulary, dtype, seed=vocabulary), backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rectify", ["all", "positive"])
@pytest.mark.parametrize("tau", TAUS)
def test_tau_and_rectify(backend, tau, rectify, dtype):
    assert_right(problem(6, 4, dtype=dtype, tau=tau, rectify=rectify), backend=backend, chunk_rows=5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"logit_scale": 0.3}, {"temperature": 1.7},
                                     {"softcap": 30.0, "logit_scale": -2.0, "temperature": 0.6}], ids=str)  # fmt: skip
def test_transforms_and_bias(backend, options, bias, dtype):
    assert_right(problem(4, 3, dtype=dtype, bias=bias, **options), backend=backend)


@pytest.mark.parametrize("reduction", ["token-mean", "sequence-mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reductions(backend, reduction, dtype):
    case = problem(4, 5, dtype=dtype, bias=True)
    case.mask[1] = False
    loss, _ = assert_right(case, backend=backend, reduction=reduction, chunk_rows=4)
    assert loss.shape == (case.targets.shape if reduction == "none" else ()) and loss.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_per_row_losses_take_any_upstream(backend, dtype):
    case = problem(4, 5, dtype=dtype, bias=True)
    upstream = torch.linspace(-1, 2, 20, device="cpu").view(5, 4).t()
    loss, gradients = case.gradients(here(upstream), backend=backend, reduction="none", chunk_rows=7)
    losses = assert_gradients(case, gradients, double(upstream).flatten(), "none")
    torch.testing.assert_close(double(loss).flatten(), losses, rtol=1e-5, atol=1e-6)


def test_every_option_of_gft_loss_is_taken(backend):
    """The rest of the options, by equality with the loss over the logits (which the oracle vouches for)."""
    case = problem(6, 3)
    with torch.no_grad():
        logits = case.hidden @ case.weight.t()
    flat = {"sequence_ids": torch.arange(18) // 3}
    ids = {"group_ids": torch.tensor([5, 1, 5, 1, 5, 0])}
    for rows, options in [
        ((), {"group_size": 3, "normalize": "mean"}),
        ((), {**ids, "singleton": "zero", "eps": 0.1}),
        ((), {**ids, "normalize": "leave-one-out"}),
        ((), {"rewards": None, "advantages": torch.linspace(-1, 2, 18).view(6, 3)}),
        ((), {"rewards": None, "num_items_in_batch": 100, "ignore_index": 7}),
        ((18,), {**flat, **ids, "reduction": "sequence-mean", "num_items_in_batch": torch.tensor(4)}),
    ]:
        options = {"rewards": case.rewards, **options}

        def shaped(x, rows=rows):
            return x.reshape(*rows, *x.shape[2:]) if rows else x

        arguments = {"mask": shaped(case.mask), "backend": backend, **options}
        expected, stats = gft_loss(shaped(logits), shaped(case.targets), return_stats=True, **arguments)
        loss, linear_stats = gft_linear_loss(
            shaped(case.hidden), case.weight, shaped(case.targets), return_stats=True, chunk_rows=5, **arguments
        )
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(linear_stats.advantages, stats.advantages)
        torch.testing.assert_close(linear_stats.coefficients, stats.coefficients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_chunk_size_changes_nothing(backend, dtype):
    """One row to all rows: the loss to 1e-6, and the head's gradient no less exact in 40 chunks than in one."""
    case = problem(10, 4, vocabulary=257, dtype=dtype, bias=True)
    losses, truth = case.truth()
    size = float(losses.abs().sum())  # the loss itself is a sum of both signs
    results = {rows: case.gradients(backend=backend, chunk_rows=rows) for rows in (1, 2, 7, 39, 40, 1000, None)}
    whole, gradients = results[None]
    error = [relative(g, t) for g, t in zip(gradients, truth, strict=True)]
    for loss, others in results.values():
        assert abs(loss.item() - whole.item()) <= 1e-6 * size
        for gradient, expected, e in zip(others, truth, error, strict=True):
            assert relative(gradient, expected) <= 1.05 * e + 1e-6


def test_a_bfloat16_sum_is_offered_and_its_error_grows():
    """The reason for the default: 40 chunks of flat rows summed in bfloat16 lose digits that one chunk keeps."""
    case = problem(10, 4, vocabulary=257, dtype=torch.bfloat16, std=0.1)
    _, truth = case.truth()
    one, many = (
        relative(case.gradients(chunk_rows=rows, accum_dtype=torch.bfloat16)[1][1], truth[1]) for rows in (None, 1)
    )
    exact = relative(assert_right(case, chunk_rows=1)[1][1], truth[1])
    assert one < 1.6 * exact and many > 3 * exact


def test_logits_of_size_100_keep_their_digits(backend):
    """A bfloat16 product rounded to bfloat16 puts logits of std 30 on a grid of up to 0.5: pi is off by tenths."""
    case = problem(6, 4, 64, 4099, torch.bfloat16, std=30.0)
    with torch.no_grad():
        peak = (case.hidden.float() @ case.weight.float().t()).argmax(-1)
    case.targets = torch.where(torch.arange(24, device=peak.device).view(6, 4) % 5 > 0, peak, case.targets)
    expected = torch.log_softmax(case.logits(), -1).gather(-1, case.targets.cpu().clamp(min=0)[..., None])[..., 0]
    live = case.live().view(6, 4)
    ours = token_log_probs(case.hidden, case.weight, case.targets, mask=case.mask, backend=backend)
    assert float((double(ours) - expected)[live].abs().max()) < 1e-4
    rounded = token_log_probs(
        case.hidden, case.weight, case.targets, mask=case.mask, backend=backend, logits_dtype=torch.bfloat16
    )
    assert float((double(rounded) - expected)[live].abs().max()) > 1e-2
    assert_right(case, backend=backend)


def test_bfloat16_logits_are_within_a_bfloat16_head(backend):
    case = problem(4, 5, vocabulary=257, dtype=torch.bfloat16)
    loss, gradients = case.gradients(backend=backend, logits_dtype=torch.bfloat16, chunk_rows=6)
    losses, truth = case.truth()
    assert loss.item() == pytest.approx(float(losses.sum()), rel=1e-2)
    assert all(relative(g, t) < 2e-2 for g, t in zip(gradients, truth, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_and_entropy(backend, dtype):
    case = problem(6, 3, dtype=dtype, bias=True, temperature=0.8)
    case.rewards[:2] = 0.5
    _, stats = case.loss(return_stats=True, return_entropy=True, backend=backend, chunk_rows=5)
    truth = truth_of.token_losses(
        case.logits().flatten(0, 1), case.targets.flatten(), case.live(), case.advantages(), tau=0.7, temperature=0.8
    )
    for value, expected in zip((stats.log_probs, stats.coefficients, stats.entropy), truth[1:], strict=True):
        assert value.shape == case.targets.shape and not value.requires_grad
        torch.testing.assert_close(double(value).flatten(), expected, rtol=2e-5, atol=5e-6)
    log_probs, entropy = token_log_probs(
        case.hidden, case.weight, case.targets, bias=case.bias, mask=case.mask, temperature=0.8, return_entropy=True,
        chunk_rows=4, backend=backend,
    )  # fmt: skip
    assert not log_probs.requires_grad
    torch.testing.assert_close(log_probs, stats.log_probs, rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(entropy, stats.entropy, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("options", [{}, {"filter_eps": 0.02}, {"reduction": "none"}], ids=str)
def test_torchs_default_dtype_changes_nothing(backend, options):
    """Over half logits too. Who makes models in bfloat16 may leave it the default."""
    case, found = problem(bias=True), []
    options = {**options, "return_stats": True, "return_entropy": True}
    half = problem(dtype=torch.float16).logits().half().requires_grad_(True)
    for default in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(default)
        try:
            (loss, stats), gradients = case.gradients(backend=backend, **options)
            over_logits = gft_loss(half, case.targets, reduction="sum", backend=backend)
            (gradient,) = torch.autograd.grad(over_logits, half)
        finally:
            torch.set_default_dtype(torch.float32)
        found.append((loss, *gradients, stats.log_probs, stats.coefficients, stats.entropy, over_logits, gradient))
    for before, after in zip(*found, strict=True):
        assert before.dtype == after.dtype and torch.equal(before, after)


def test_fp16_survives_a_gradient_scaler(backend):
    """At weight 1/N and pi near 1e-6 an fp16 logit gradient would underflow before the scaler's 65536 reaches it."""
    case = problem(1, 2, 16, 50257, torch.float16, std=0.5)
    case.rewards, case.options = None, {"group_size": None, "tau": 0.0}
    (gradient,) = torch.autograd.grad(case.loss(num_items_in_batch=8192, backend=backend) * 65536.0, [case.weight])
    weights = case.live().double() / 8192
    _, dlogits = truth_of.loss_and_gradient(
        case.logits()[0], case.targets.flatten(), case.live(), torch.ones(2), weights, 65536.0, tau=0.0
    )
    assert relative(gradient, dlogits.T @ double(case.hidden)[0]) < 1e-3
    assert gradient.eq(0).float().mean() < 0.02


@pytest.mark.parametrize(("reduction", "items"), [("token-mean", None), ("token-mean", 2.0**20), ("none", None)])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_flat_rows_of_little_weight(dtype, reduction, items):
    """At weight 2^-20 what a product takes of the logits' gradient must survive float16."""
    case = problem(4, 3, 32, 257, dtype, std=0.5, bias=True, tau=0.0)
    upstream = UPSTREAM * (items or 1.0)
    loss, gradients = case.gradients(upstream, reduction=reduction, num_items_in_batch=items, chunk_rows=5)
    assert_loss(loss * (items or 1.0), assert_gradients(case, gradients, UPSTREAM, "sum" if items else reduction))


@pytest.mark.parametrize("autocast", HALVES)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden_dtype", DTYPES, ids=str)
def test_autocast_multiplies_in_its_dtype_and_keeps_the_gradients_dtypes(hidden_dtype, weight_dtype, autocast):
    case = problem(bias=True)
    case.hidden = case.hidden.detach().to(hidden_dtype).requires_grad_(True)
    case.weight = case.weight.detach().to(weight_dtype).requires_grad_(True)
    with torch.autocast(torch.get_default_device().type, dtype=autocast):
        loss, gradients = case.gradients()
    assert [g.dtype for g in gradients] == [hidden_dtype, weight_dtype, torch.float32]
    case.hidden, case.weight = (x.detach().to(autocast).requires_grad_(True) for x in (case.hidden, case.weight))
    assert_loss(loss, assert_gradients(case, gradients))


@pytest.mark.parametrize("width, dtype", [(49152, torch.float32), (6144, torch.bfloat16), (1001, torch.float32)])
def test_rows_of_a_chunk_start_on_cache_lines_and_no_page_apart(width, dtype):
    rows = row_buffer(3, width, dtype, torch.device("cpu"))
    step = rows.stride(0) * rows.element_size()
    assert rows.shape == (3, width) and step % 64 == 0 and step % 4096 != 0


def test_any_strides(backend):
    case = problem(4, 3, 32, 67)
    expected, gradients = case.gradients(backend=backend)
    hidden = torch.cat([case.hidden, case.hidden], 1).detach().requires_grad_(True)
    weight = case.weight.detach().t().contiguous().requires_grad_(True)
    loss = gft_linear_loss(
        hidden[:, :3], weight.t(), case.targets.t().contiguous().t(), mask=case.mask, rewards=case.rewards,
        group_size=2, backend=backend,
    )  # fmt: skip
    (loss * UPSTREAM).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(hidden.grad[:, :3], gradients[0])
    torch.testing.assert_close(weight.grad.t(), gradients[1])
