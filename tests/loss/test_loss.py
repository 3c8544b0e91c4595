"""`gft_loss` against the float64 oracle: every backend, shape, dtype and option."""

from __future__ import annotations

import cases
import oracle
import pytest
import torch
from cases import DTYPES, TAUS, UPSTREAM, VOCABULARIES, assert_elements, assert_loss, assert_rounded, problem, run

from gft_kernels import GFTLoss, gft_loss, policy_loss


def loss_of(case, backend, device, upstream=UPSTREAM, **kwargs):
    """Loss and gradient of a problem through the public function, both back on the CPU."""
    names = ("temperature", "softcap", "rectify", "tau")
    options = {name: case.options[name] for name in names if name in case.options}
    out, gradient = run(
        gft_loss, case.logits.to(device), case.targets.to(device), mask=case.mask.to(device),
        rewards=case.rewards.to(device), group_size=case.group_size, backend=backend, upstream=upstream,
        **{**options, **kwargs},
    )  # fmt: skip
    return out, gradient.cpu()


def assert_matches(case, loss, gradient, upstream=UPSTREAM, **truth_options):
    """In float32 as near as eager, or to a few roundings; a softcap's tanh may be off by half of one of its range."""
    losses, truth = case.truth(upstream, **truth_options)
    assert_loss(loss, losses)
    if gradient.dtype == torch.float32:
        error, eager = (float((g.double() - truth).norm()) for g in (gradient, cases.eager_gradient(case, upstream)))
        limit = 2e-6 + 2**-24 * (case.options.get("softcap") or 0.0) / case.options.get("temperature", 1.0)
        assert error <= max(1.1 * eager, limit * float(truth.norm())), f"error {error:.3e}, eager {eager:.3e}"
    else:
        assert_rounded(gradient, truth, roundings=2)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_every_vocabulary_and_dtype(backend, device, vocabulary, dtype, inplace):
    case = problem(2, 2, vocabulary, dtype, seed=vocabulary)
    loss, gradient = loss_of(case, backend, device, inplace=inplace)
    assert_matches(case, loss, gradient)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rectify", ["all", "positive"])
@pytest.mark.parametrize("tau", TAUS)
def test_tau_and_rectify(backend, device, tau, rectify, dtype):
    case = problem(6, 4, 131, dtype, group_size=3, tau=tau, rectify=rectify)
    loss, gradient = loss_of(case, backend, device)
    assert_near(case, loss, gradient)


def assert_near(case, loss, gradient, **truth_options):
    """Where eager float32 is no measure: it computes another loss, or loses more than it should."""
    losses, truth = case.truth(UPSTREAM, **truth_options)
    assert_loss(loss, losses)
    assert_elements(gradient, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0, 30.0])
@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_temperature_and_softcap(backend, device, temperature, softcap, dtype):
    case = problem(4, 3, 1003, dtype, std=8.0, temperature=temperature, softcap=softcap)
    loss, gradient = loss_of(case, backend, device)
    assert_matches(case, loss, gradient)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_an_upstream_that_is_a_power_of_two_costs_no_second_rounding(backend, device, dtype):
    case = problem(4, 3, 1003, dtype)
    _, gradient = loss_of(case, backend, device, upstream=8.0)
    assert_rounded(gradient, case.truth(8.0)[1], roundings=1 if dtype == torch.bfloat16 else 2)


@pytest.mark.parametrize("given", [None, 17, 17.0, torch.tensor(17)], ids=["counted", "int", "float", "tensor"])
@pytest.mark.parametrize("reduction", ["token-mean", "sequence-mean"])
def test_means_and_their_denominators(backend, device, reduction, given):
    case = problem(4, 5, 53)
    case.mask[1] = False  # a response without live rows does not count
    loss, gradient = loss_of(case, backend, device, reduction=reduction, num_items_in_batch=given)
    assert_near(case, loss, gradient, reduction=reduction, num_items=None if given is None else 17)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sum_and_per_row_with_any_upstream(backend, device, dtype):
    case = problem(4, 5, 53, dtype)
    loss, _ = loss_of(case, backend, device, reduction="sum")
    assert_loss(loss, case.truth(1.0, reduction="sum")[0])
    upstream = torch.randn(4, 5)
    loss, gradient = loss_of(case, backend, device, upstream=upstream, reduction="none")
    losses, truth = case.truth(upstream.flatten().double(), reduction="none")
    torch.testing.assert_close(loss.detach().cpu().double().flatten(), losses, rtol=1e-5, atol=1e-6)
    assert_elements(gradient, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pi", [0.9, 0.99, 0.999])
def test_peaked_rows_keep_the_targets_gradient(backend, device, pi, dtype):
    """Rounding pi before subtracting 1 would lose up to all of this element."""
    vocabulary = 4099
    logits = torch.zeros(1, 2, vocabulary)
    logits[..., 5] = torch.tensor(pi * (vocabulary - 1) / (1 - pi)).log()
    targets = torch.full((1, 2), 5)
    case = cases.Problem(logits.to(dtype), targets, targets > 0, torch.ones(1), 1, {"tau": 0.7})
    loss, gradient = loss_of(case, backend, device)
    assert_matches(case, loss, gradient)


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_a_common_offset_costs_no_digits(backend, device, offset):
    case = problem(4, 3, 1003)
    # multiples of 2^-9 stay exact beside 1e4 in float32
    rounded = (case.logits * 512).round() / 512
    shifted = cases.Problem(rounded + offset, case.targets, case.mask, case.rewards, 2, case.options)
    loss, gradient = loss_of(shifted, backend, device)
    losses, truth = cases.Problem(rounded, case.targets, case.mask, case.rewards, 2, case.options).truth(UPSTREAM)
    assert loss.item() == pytest.approx(float(losses.sum()), rel=1e-5)
    torch.testing.assert_close(gradient.double(), truth, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e10])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_do_not_count_cannot_poison(backend, device, poison, inplace, dtype):
    case = problem(6, 3, 101, dtype)
    rewards = case.rewards.clone()
    rewards[:2] = 0.5  # a group of equal rewards: A = 0
    clean = cases.Problem(case.logits, case.targets, case.mask, rewards, 2, case.options)
    dead = ~clean.mask.clone()
    dead[:2] = True
    bad_logits = torch.where(dead[..., None], torch.tensor(poison).to(dtype), case.logits)
    bad_targets = torch.where(case.mask, case.targets, 10**9)
    bad = cases.Problem(bad_logits, bad_targets, case.mask, rewards, 2, case.options)
    results = [loss_of(p, backend, device, inplace=inplace) for p in (clean, bad)]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[1][1][dead].eq(0).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("way", ["beside", "in place", "over a head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_an_upstream_cannot_poison_rows_that_do_not_count(backend, device, poison, way, dtype):
    """Masked, A = 0, weight 0: their gradient is 0 and not 0·inf; a row that counts has what it was handed."""
    logits, targets = torch.randn(5, 101, device=device).to(dtype), torch.tensor([-100, 1, 2, 3, 4], device=device)
    advantages, weights = torch.ones(5, device=device), torch.ones(5, device=device)
    advantages[1] = weights[2] = 0.0
    upstream = torch.tensor([poison] * 4 + [UPSTREAM], device=device)
    how = {"inplace": True} if way == "in place" else {}
    if way == "over a head":
        how = {"weight": torch.eye(101, device=device, dtype=dtype)}
    _, gradient = run(
        policy_loss, logits, targets, advantages=advantages, weights=weights, reduction="none", backend=backend,
        upstream=upstream, **how,
    )  # fmt: skip
    assert gradient[:3].eq(0).all() and not gradient[3].isfinite().all() and gradient[4].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tau", TAUS)
def test_banned_tokens_have_no_probability_and_no_gradient(backend, device, tau, dtype):
    case = problem(4, 3, 1003, dtype, tau=tau)
    case.logits[..., 100:900] = -float("inf")
    targets = case.targets % 100
    case = cases.Problem(case.logits, targets, case.mask, case.rewards, 2, case.options)
    loss, gradient = loss_of(case, backend, device)
    assert gradient[..., 100:900].eq(0).all()
    assert_near(case, loss, gradient)


LATE = {  # logits whose first thousands say nothing about where the row's top is, targets
    "all banned but the end": (torch.tensor([-torch.inf] * 5000 + [-300.0, -301.0, -299.5]), [5001, 5002]),
    "a climb": (torch.linspace(-500, 500, 9001), [8999, 4000]),
}


@pytest.mark.parametrize("row", LATE)
def test_the_top_may_come_late(backend, device, row):
    logits, targets = LATE[row][0].expand(1, 2, -1).clone(), torch.tensor([LATE[row][1]])
    case = cases.Problem(logits, targets, targets > 0, torch.ones(1), 1, {"tau": 0.7})
    assert_near(case, *loss_of(case, backend, device))


def test_a_banned_target(backend, device):
    logits = torch.randn(3, 11, device=device)
    logits[0, 4] = -float("inf")
    targets = torch.tensor([4, 5, 6], device=device)
    loss, gradient = run(gft_loss, logits, targets, tau=0.7, reduction="none", backend=backend)
    assert loss[0] == 0 and gradient[0].eq(0).all(), "C = pi = 0: the limit of pi·log pi"
    loss, gradient = run(gft_loss, logits, targets, tau=0.0, reduction="none", backend=backend)
    assert loss[0] == float("inf"), "C = 1 reports it"
    torch.testing.assert_close(gradient, run(torch.nn.functional.cross_entropy, logits, targets, reduction="none")[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_live_row_is_reported_in_that_row_only(backend, device, bad):
    logits = torch.randn(3, 1500, device=device)
    good = run(gft_loss, logits, torch.tensor([4, 5, 6], device=device), reduction="none", backend=backend)[1]
    logits[1, 1200 if bad != -float("inf") else slice(None)] = bad  # nothing but bans
    targets = torch.tensor([4, 5, 6], device=device)
    loss, gradient = run(gft_loss, logits, targets, reduction="none", backend=backend)
    assert loss.isnan().tolist() == [False, True, False]
    assert gradient[1].isnan().all()
    assert torch.equal(gradient[[0, 2]], good[[0, 2]])


LAYOUTS = {
    "sliced positions": lambda z: torch.cat([z, z], 1)[:, : z.shape[1]],
    "shifted start": lambda z: torch.cat([z[..., :3], z], -1)[..., 3:],
    "padded columns": lambda z: torch.cat([z, z], -1)[..., : z.shape[-1]],
    "responses last": lambda z: z.transpose(0, 1).contiguous().transpose(0, 1),
    "vocabulary outermost": lambda z: z.permute(2, 0, 1).contiguous().permute(1, 2, 0),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(backend, device, layout, dtype, inplace):
    case = problem(4, 3, 1003, dtype)
    if layout == "vocabulary outermost" and backend not in ("reference", "auto"):
        backend = "auto"  # the kernels refuse a strided vocabulary by name; auto serves it
    expected = loss_of(case, "reference", device)
    leaf = case.logits.to(device).clone().requires_grad_(True)
    strided = LAYOUTS[layout](leaf)
    assert strided.stride() != leaf.stride()
    loss = gft_loss(
        strided, case.targets.to(device), mask=case.mask.to(device), rewards=case.rewards.to(device), group_size=2,
        inplace=inplace and strided._base is not leaf, backend=backend,
    )  # fmt: skip
    (loss * UPSTREAM).backward()
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaf.grad.cpu(), expected[1], rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)


def test_expanded_logits_targets_and_upstream(backend, device):
    row = torch.randn(1, 1, 57, device=device)
    targets = torch.tensor([[3], [4]], device=device).expand(2, 5)
    _out, gradient = run(gft_loss, row.expand(2, 5, 57), targets, reduction="none", backend=backend,
                        upstream=torch.tensor(2.5).expand(2, 5))  # fmt: skip
    expected = run(gft_loss, row.expand(2, 5, 57).contiguous(), targets.contiguous(), reduction="sum",
                   backend="reference", upstream=2.5)[1]  # fmt: skip
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("normalize", ["std", "mean", "leave-one-out"])
@pytest.mark.parametrize("singleton", ["reward", "zero"])
def test_ragged_shuffled_groups_and_packed_rows(backend, device, normalize, singleton):
    """Responses of different length, packed; groups of 1, 2 and 4 in shuffled order; one group of equal rewards."""
    group_ids = torch.tensor([7, -3, 7, 9, 7, 2, 2, 7, -3])
    rewards = torch.tensor([1.0, 0.25, 0.0, 0.75, 0.5, 0.3, 0.3, 1.0, 0.9])
    lengths = torch.tensor([3, 1, 4, 1, 5, 2, 6, 2, 3])
    sequence_ids = torch.repeat_interleave(torch.arange(9), lengths)[torch.randperm(27)]
    logits, targets = torch.randn(27, 203) * 2, torch.randint(203, (27,))
    targets[5] = -100
    advantages = oracle.advantages(rewards, group_ids.tolist(), normalize, singleton=singleton)
    live = targets != -100
    for reduction in ("token-mean", "sequence-mean"):
        weights = oracle.row_weights(live, sequence_ids.tolist(), reduction)
        losses, truth = oracle.loss_and_gradient(
            logits, targets, live, advantages[sequence_ids], weights, UPSTREAM, tau=0.7
        )
        loss, gradient = run(
            gft_loss, logits.to(device), targets.to(device), rewards=rewards.to(device), reduction=reduction,
            group_ids=group_ids.to(device), sequence_ids=sequence_ids.to(device), normalize=normalize,
            singleton=singleton, backend=backend,
        )  # fmt: skip
        assert_loss(loss, losses)
        assert_elements(gradient.cpu(), truth)


@pytest.mark.parametrize("shape", ["response", "row"])
def test_advantages_given(backend, device, shape):
    case = problem(4, 3, 53)
    advantages = torch.randn(4) if shape == "response" else torch.randn(4, 3)
    per_row = advantages.repeat_interleave(3) if shape == "response" else advantages.flatten()
    weights = oracle.row_weights(case.live(), [r // 3 for r in range(12)], "token-mean")
    losses, truth = oracle.loss_and_gradient(
        case.logits.view(12, 53), case.targets.flatten(), case.live(), per_row.double(), weights, UPSTREAM, tau=0.7
    )
    for packed in (False, True):
        flat = (lambda x: x.flatten(0, 1)) if packed else (lambda x: x)
        extra = {"sequence_ids": torch.arange(12, device=device) // 3} if packed and shape == "response" else {}
        given = advantages if shape == "response" else flat(advantages)
        loss, gradient = run(
            gft_loss, flat(case.logits).to(device), flat(case.targets).to(device), mask=flat(case.mask).to(device),
            advantages=given.to(device), backend=backend, **extra,
        )  # fmt: skip
        assert_loss(loss, losses)
        assert_elements(gradient.cpu().view(12, 53), truth)


@pytest.mark.parametrize("shape", [(0, 4, 9), (3, 0, 9), (0, 9)])
@pytest.mark.parametrize("inplace", [False, True])
def test_no_rows(backend, device, shape, inplace):
    leaf = torch.randn(shape, device=device, requires_grad=True)
    loss = gft_loss(
        leaf * 1, torch.zeros(shape[:-1], dtype=torch.long, device=device), inplace=inplace, backend=backend
    )
    loss.backward()
    assert loss == 0 and leaf.grad.shape == shape


@pytest.mark.parametrize("reduction", ["token-mean", "sequence-mean", "sum"])
def test_nothing_live_gives_zero_and_a_connected_gradient(backend, device, reduction):
    logits = torch.full((2, 3, 9), float("nan"), device=device)
    loss, gradient = run(
        gft_loss, logits, torch.full((2, 3), -100, device=device), reduction=reduction, backend=backend
    )
    assert loss == 0 and gradient.eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("want_gradient", [False, True])
def test_statistics(backend, device, want_gradient, dtype):
    case = problem(6, 3, 1003, dtype)
    rewards = case.rewards.clone()
    rewards[:2] = 0.5
    case.logits[4, :, 5:900] = -float("inf")  # entropy leaves banned tokens out
    case = cases.Problem(case.logits, case.targets, case.mask, rewards, 2, case.options)
    with torch.set_grad_enabled(want_gradient):
        _, stats = gft_loss(
            case.logits.to(device).requires_grad_(True), case.targets.to(device), mask=case.mask.to(device),
            rewards=rewards.to(device), group_size=2, return_stats=True, return_entropy=True, backend=backend,
        )  # fmt: skip
    advantages = oracle.advantages(rewards, case.groups()).repeat_interleave(3)
    truth = oracle.token_losses(
        case.logits.view(18, -1).double(), case.targets.flatten(), case.live(), advantages, tau=0.7
    )
    for name, expected in zip(("log_probs", "coefficients", "entropy"), truth[1:], strict=True):
        value = getattr(stats, name)
        assert value.shape == case.targets.shape and not value.requires_grad
        torch.testing.assert_close(value.cpu().flatten().double(), expected, rtol=2e-5, atol=2e-6)
    expected = torch.where(case.live(), advantages, 0.0)
    torch.testing.assert_close(stats.advantages.cpu().flatten().double(), expected, rtol=1e-6, atol=1e-6)


def test_one_response_alone_is_as_among_others(backend, device):
    """What is given of it is repeated over its rows: left as a view of stride 0, it would be read past its end."""
    logits, targets = torch.randn(1, 6, 101, device=device), torch.randint(101, (1, 6), device=device)

    def losses(number):
        given = torch.zeros(number, dtype=torch.bool, device=device)
        one_each = {"weights": torch.full((number,), 2.0, device=device), "given": given}
        rows = logits.repeat(number, 1, 1), targets.repeat(number, 1)
        return gft_loss(*rows, **one_each, rectify="given", tau=0.5, reduction="none", backend=backend)

    assert torch.equal(losses(1)[0], losses(2)[1])


def test_twenty_runs_are_bit_equal(backend, device):
    case = problem(4, 5, 3001)
    first = loss_of(case, backend, device)
    for _ in range(19):
        loss, gradient = loss_of(case, backend, device)
        assert torch.equal(loss, first[0]) and torch.equal(gradient, first[1])


def test_the_module_is_the_function(device):
    case = problem(4, 3, 53)
    module = GFTLoss(tau=0.4, group_size=2)
    loss = module(case.logits, case.targets, rewards=case.rewards)
    assert loss == gft_loss(case.logits, case.targets, rewards=case.rewards, group_size=2, tau=0.4)
    assert "tau=0.4" in repr(module)
    with pytest.raises(TypeError, match="taus must be an option of gft_loss"):
        GFTLoss(taus=0.4)
