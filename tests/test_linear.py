"""`gft_linear_loss` against the float64 oracle on logits = hidden @ weight^T: dtypes, options, chunks, gradients."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import oracle
import pytest
import torch
from cases import DTYPES, TAUS

from gft_kernels import GFTLinearLoss, gft_linear_loss, gft_loss, linear_chunks, token_log_probs

UPSTREAM = 3.7


@dataclass
class LinearProblem:
    """Leaves of one problem: padded hidden states, head, bias; rewards in pairs, a fifth of the rows masked."""

    hidden: torch.Tensor  # (S, T, D)
    weight: torch.Tensor  # (V, D)
    bias: torch.Tensor | None
    targets: torch.Tensor
    mask: torch.Tensor
    rewards: torch.Tensor
    options: dict = field(default_factory=dict)  # of the oracle and of the loss alike

    def leaves(self):
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    def loss(self, **kwargs):
        return gft_linear_loss(
            self.hidden, self.weight, self.targets, bias=self.bias, mask=self.mask,
            **{"rewards": self.rewards, "group_size": 2, **self.options, **kwargs},
        )  # fmt: skip

    def gradients(self, upstream=UPSTREAM, **kwargs):
        out = self.loss(**kwargs)
        loss = out[0] if isinstance(out, tuple) else out
        return out, torch.autograd.grad((loss * upstream).sum(), self.leaves())

    def truth(self, upstream=UPSTREAM, reduction="token-mean"):
        """Loss (per weighted row) and gradients in float64, from the oracle's gradient of the logits."""
        responses, length, hidden_size = self.hidden.shape
        x, w = self.hidden.detach().double().view(-1, hidden_size), self.weight.detach().double()
        logits = x @ w.T if self.bias is None else x @ w.T + self.bias.detach().double()
        live = (self.mask & (self.targets != -100)).flatten()
        advantages = oracle.advantages(self.rewards, [s // 2 for s in range(responses)]).repeat_interleave(length)
        weights = oracle.row_weights(live, [r // length for r in range(len(live))], reduction)
        losses, dlogits = oracle.loss_and_gradient(
            logits, self.targets.flatten(), live, advantages, weights, upstream, **{"tau": 0.7, **self.options}
        )
        gradients = [(dlogits @ w).view(self.hidden.shape), dlogits.T @ x]
        return losses, gradients if self.bias is None else [*gradients, dlogits.sum(0)]


def problem(responses=4, length=3, hidden_size=48, vocabulary=101, dtype=torch.float32, std=3.0, bias=False, seed=0,
            **options):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, size=1.0):
        return (torch.randn(*shape, generator=generator) * size).to(dtype).requires_grad_(True)

    mask = torch.rand(responses, length, generator=generator) < 0.8
    mask[0, 0] = True
    targets = torch.randint(vocabulary, (responses, length), generator=generator)
    targets[0, 0] = vocabulary - 1  # the last column is the one a tail forgets
    targets[-1, -1] = -100
    return LinearProblem(
        random(responses, length, hidden_size),
        random(vocabulary, hidden_size, size=std / hidden_size**0.5),
        random(vocabulary) if bias else None,
        targets, mask, torch.rand(responses, generator=generator), options,
    )  # fmt: skip


def relative(value, truth):
    return float((value.double() - truth).norm() / truth.norm().clamp(min=1e-300))


def one_rounding(truth, dtype):
    """The relative error in norm that rounding the truth once would have, and float32's noise."""
    return 1.05 * relative(truth.to(dtype), truth) + 1e-5


def assert_right(case, upstream=UPSTREAM, **kwargs):
    """Loss to 1e-5; gradients to one rounding of their dtype."""
    loss, gradients = case.gradients(upstream, **kwargs)
    losses, truth = case.truth(upstream, kwargs.get("reduction", "token-mean"))
    assert abs(loss.sum().item() - float(losses.sum())) <= 1e-5 * float(losses.abs().sum())
    for gradient, leaf, expected in zip(gradients, case.leaves(), truth, strict=True):
        assert gradient.shape == leaf.shape and gradient.dtype == leaf.dtype
        assert relative(gradient, expected) <= one_rounding(expected, leaf.dtype)
    return loss, gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("hidden_size", "vocabulary"), [(64, 50257), (64, 1000), (896, 4099), (2048, 131), (7, 1), (1, 2)])
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
    upstream = torch.randn(4, 5, generator=torch.Generator().manual_seed(3))
    loss, gradients = case.gradients(upstream.t().contiguous().t(), backend=backend, reduction="none", chunk_rows=7)
    losses, truth = case.truth(upstream.flatten().double(), "none")
    torch.testing.assert_close(loss.detach().double().flatten(), losses, rtol=1e-5, atol=1e-6)
    for gradient, expected in zip(gradients, truth, strict=True):
        assert relative(gradient, expected) <= one_rounding(expected, dtype)


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
        shaped = lambda x, rows=rows: x.reshape(*rows, -1) if rows and x.dim() > 2 else x.reshape(rows or x.shape)  # noqa: E731
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
    """The reason for the default: 40 chunks summed in bfloat16 lose digits that one chunk keeps."""
    case = problem(10, 4, vocabulary=257, dtype=torch.bfloat16)
    _, truth = case.truth()
    one, many = (
        relative(case.gradients(chunk_rows=rows, accum_dtype=torch.bfloat16)[1][1], truth[1]) for rows in (None, 1)
    )
    exact = relative(case.gradients(chunk_rows=1)[1][1], truth[1])
    assert exact < one * 1.2 and many > 2 * exact


def test_logits_of_size_100_keep_their_digits(backend):
    """A bfloat16 product rounded to bfloat16 puts logits of std 30 on a grid of up to 0.5: pi is off by tenths."""
    case = problem(6, 4, 64, 4099, torch.bfloat16, std=30.0)
    with torch.no_grad():
        peak = (case.hidden.float() @ case.weight.float().t()).argmax(-1)
    case.targets = torch.where(torch.rand(6, 4, generator=torch.Generator().manual_seed(1)) < 0.8, peak, case.targets)
    logits = case.hidden.detach().double() @ case.weight.detach().double().t()
    expected = torch.log_softmax(logits, -1).gather(-1, case.targets.clamp(min=0)[..., None])[..., 0]
    live = case.mask & (case.targets != -100)
    ours = token_log_probs(case.hidden, case.weight, case.targets, mask=case.mask, backend=backend)
    assert float((ours.double() - expected)[live].abs().max()) < 1e-4
    rounded = token_log_probs(
        case.hidden, case.weight, case.targets, mask=case.mask, backend=backend, logits_dtype=torch.bfloat16
    )
    assert float((rounded.double() - expected)[live].abs().max()) > 1e-2
    assert_right(case, backend=backend)


def test_bfloat16_logits_are_within_a_bfloat16_head(backend):
    case = problem(4, 5, vocabulary=257, dtype=torch.bfloat16)
    loss, gradients = case.gradients(backend=backend, logits_dtype=torch.bfloat16, chunk_rows=6)
    losses, truth = case.truth()
    assert loss.item() == pytest.approx(float(losses.sum()), rel=1e-2)
    assert all(relative(g, t) < 2e-2 for g, t in zip(gradients, truth, strict=True))


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("reduction", ["token-mean", "none"])
def test_only_the_gradients_asked_for(monkeypatch, wanted, reduction):
    """A frozen head or trunk costs no product, and gets no gradient."""
    case = problem(bias=True)
    _, truth = case.truth(reduction=reduction)
    for leaf, want in zip(case.leaves(), wanted, strict=True):
        leaf.requires_grad_(want)
    products = []
    multiply = linear_chunks.multiply
    monkeypatch.setattr(linear_chunks, "multiply", lambda *a, **k: (products.append("head"), multiply(*a, **k)))
    head = linear_chunks.Head
    gradient = head.hidden_gradient
    monkeypatch.setattr(head, "hidden_gradient", lambda *a: (products.append("hidden"), gradient(*a)))
    loss = case.loss(reduction=reduction)
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        (loss * UPSTREAM).sum().backward()
    assert products == ["hidden"] * wanted[0] + ["head"] * wanted[1]
    for leaf, want, expected in zip(case.leaves(), wanted, truth, strict=True):
        assert (leaf.grad is not None) == want
        if want:
            assert relative(leaf.grad, expected) < 1e-5


def test_no_grad_computes_no_gradient():
    case = problem()
    with torch.no_grad():
        loss = case.loss()
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(case.loss().item())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tied_embeddings(dtype):
    """One parameter is embedding and head: its two gradients add up as they do without fusion."""
    torch.manual_seed(0)
    table = (torch.randn(61, 16) * 0.7).to(dtype).requires_grad_(True)
    tokens, targets = torch.randint(61, (3, 5)), torch.randint(61, (3, 5))
    (gft_linear_loss(table[tokens], table, targets, chunk_rows=4) * UPSTREAM).backward()
    reference = table.detach().float().requires_grad_(True)
    (gft_loss(reference[tokens] @ reference.t(), targets) * UPSTREAM).backward()
    tolerance = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    assert relative(table.grad, reference.grad.double()) < tolerance


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,)])
@pytest.mark.parametrize("reduction", ["token-mean", "none"])
def test_no_rows(shape, reduction):
    hidden = torch.randn(*shape, 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=True)
    loss = gft_linear_loss(hidden, weight, torch.zeros(shape, dtype=torch.long), reduction=reduction)
    loss.sum().backward()
    assert loss.sum() == 0 and hidden.grad.shape == hidden.shape and weight.grad.eq(0).all()


@pytest.mark.parametrize("reduction", ["token-mean", "sequence-mean", "sum", "none"])
@pytest.mark.parametrize("dead", ["masked", "equal rewards"])
def test_nothing_that_matters_gives_zero_and_connected_gradients(reduction, dead):
    case = problem(bias=True)
    with torch.no_grad():
        case.hidden.fill_(float("nan"))
    if dead == "masked":
        case.mask[:] = False
    else:
        case.rewards[:] = 0.3
    loss, gradients = case.gradients(reduction=reduction)
    assert loss.sum() == 0 and all(g.eq(0).all() for g in gradients)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_do_not_count_cannot_poison(backend, poison, dtype):
    case = problem(6, 3, dtype=dtype)
    case.rewards[:2] = 0.5
    clean = case.gradients(backend=backend)
    dead = ~case.mask | (case.targets == -100)
    dead[:2] = True
    with torch.no_grad():
        case.hidden[dead] = poison
    case.targets = torch.where(case.mask, case.targets, 10**9)
    loss, gradients = case.gradients(backend=backend)
    assert torch.equal(loss, clean[0]) and all(map(torch.equal, gradients, clean[1]))
    assert gradients[0][dead].eq(0).all()


def test_dead_rows_leave_before_the_first_product(monkeypatch):
    case = problem(6, 5)
    case.rewards[:2] = 0.5
    rows = []
    logits = linear_chunks.Head.logits
    monkeypatch.setattr(
        linear_chunks.Head, "logits", lambda self, h, out: (rows.append(len(h)), logits(self, h, out)) and None
    )
    live = case.mask & (case.targets != -100)
    case.loss()
    assert sum(rows) == int(live[2:].sum())
    rows.clear()
    case.loss(return_stats=True)
    assert sum(rows) == int(live.sum())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_and_entropy(backend, dtype):
    case = problem(6, 3, dtype=dtype, bias=True, temperature=0.8)
    case.rewards[:2] = 0.5
    _, stats = case.loss(return_stats=True, return_entropy=True, backend=backend, chunk_rows=5)
    logits = case.hidden.detach().double() @ case.weight.detach().double().t() + case.bias.detach().double()
    live = (case.mask & (case.targets != -100)).flatten()
    advantages = oracle.advantages(case.rewards, [s // 2 for s in range(6)]).repeat_interleave(3)
    truth = oracle.token_losses(logits.view(18, -1), case.targets.flatten(), live, advantages, tau=0.7, temperature=0.8)
    for value, expected in zip((stats.log_probs, stats.coefficients, stats.entropy), truth[1:], strict=True):
        assert value.shape == case.targets.shape and not value.requires_grad
        torch.testing.assert_close(value.flatten().double(), expected, rtol=2e-5, atol=5e-6)
    log_probs, entropy = token_log_probs(
        case.hidden, case.weight, case.targets, bias=case.bias, mask=case.mask, temperature=0.8, return_entropy=True,
        chunk_rows=4, backend=backend,
    )  # fmt: skip
    assert not log_probs.requires_grad
    torch.testing.assert_close(log_probs, stats.log_probs, rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(entropy, stats.entropy, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["token-mean", "none"])
def test_a_retained_graph_can_be_walked_again(dtype, reduction):
    case = problem(dtype=dtype, bias=True)
    loss = case.loss(reduction=reduction).sum()
    first = [g.clone() for g in torch.autograd.grad(loss * 3.0, case.leaves(), retain_graph=True)]
    second = torch.autograd.grad(loss * 3.0, case.leaves(), retain_graph=True)
    assert all(map(torch.equal, first, second))
    loss.backward(torch.tensor(1.0), retain_graph=True)  # .grad must not be the saved buffer, or this would double it
    loss.backward(torch.tensor(1.0), retain_graph=True)
    for leaf, g in zip(case.leaves(), torch.autograd.grad(loss * 2.0, case.leaves()), strict=True):
        torch.testing.assert_close(leaf.grad, g)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, case.leaves())


def test_the_upstream_scales_a_loss_among_others():
    case = problem()
    (3.0 * case.loss() + case.hidden.square().sum()).backward()
    _, (expected, _) = case.gradients(3.0)
    torch.testing.assert_close(case.hidden.grad, expected + 2 * case.hidden.detach())


def test_double_backward_is_an_error():
    case = problem()
    (gradient,) = torch.autograd.grad(case.loss() * 2.0, [case.hidden], create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        gradient.sum().backward()


def test_fp16_survives_a_gradient_scaler(backend):
    """At weight 1/N and pi near 1e-6 an fp16 logit gradient would underflow before the scaler's 65536 reaches it."""
    case = problem(1, 2, 16, 50257, torch.float16, std=0.5)
    case.rewards, case.options = None, {"group_size": None, "tau": 0.0}
    (gradient,) = torch.autograd.grad(case.loss(num_items_in_batch=8192, backend=backend) * 65536.0, [case.weight])
    x = case.hidden.detach().double().view(2, -1)
    live = (case.mask & (case.targets != -100)).flatten()
    weights = live.double() / 8192
    _, dlogits = oracle.loss_and_gradient(
        x @ case.weight.detach().double().T, case.targets.flatten(), live, torch.ones(2), weights, 65536.0, tau=0.0
    )
    assert relative(gradient, dlogits.T @ x) < 1e-3
    assert gradient.eq(0).float().mean() < 0.02


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden_dtype", DTYPES, ids=str)
def test_autocast_multiplies_in_its_dtype_and_keeps_the_gradients_dtypes(hidden_dtype, weight_dtype, autocast):
    case = problem(bias=True)
    case.hidden = case.hidden.detach().to(hidden_dtype).requires_grad_(True)
    case.weight = case.weight.detach().to(weight_dtype).requires_grad_(True)
    with torch.autocast("cpu", dtype=autocast):
        loss, gradients = case.gradients()
    assert [g.dtype for g in gradients] == [hidden_dtype, weight_dtype, torch.float32]
    case.hidden, case.weight = (x.detach().to(autocast).requires_grad_(True) for x in (case.hidden, case.weight))
    losses, truth = case.truth()
    assert abs(loss.item() - float(losses.sum())) <= 1e-5 * float(losses.abs().sum())
    for gradient, expected in zip(gradients, truth, strict=True):
        assert relative(gradient, expected) <= one_rounding(expected, gradient.dtype)


def test_any_strides(backend):
    case = problem(4, 3, 32, 67)
    expected, gradients = case.gradients(backend=backend)
    hidden = torch.cat([case.hidden, case.hidden], 1).detach().requires_grad_(True)
    weight = case.weight.detach().t().contiguous().requires_grad_(True)
    loss = gft_linear_loss(
        hidden[:, :3], weight.t(), case.targets.t().contiguous().t(), mask=case.mask, rewards=case.rewards, group_size=2,
        backend=backend,
    )  # fmt: skip
    (loss * UPSTREAM).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(hidden.grad[:, :3], gradients[0])
    torch.testing.assert_close(weight.grad.t(), gradients[1])


def operator_arguments(dtype, **options):
    captured = []
    from gft_kernels import linear_operator

    case = problem(dtype=dtype, bias=True)
    original = linear_operator.linear_loss
    try:
        linear_operator.linear_loss = lambda call, backend: (captured.append((call, backend)), original(call, backend))[1]
        case.loss(backend="reference", **options)
    finally:
        linear_operator.linear_loss = original
    return linear_operator._pack(*captured[0])


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"return_entropy": True, "chunk_rows": 5}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck(dtype, options):
    torch.library.opcheck(torch.ops.gft.linear_loss.default, operator_arguments(dtype, **options))
    torch.library.opcheck(torch.ops.gft.linear_scale.default, (torch.randn(3, 4), torch.tensor(2.0), dtype))


@pytest.mark.parametrize("reduction", ["token-mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_whole(reduction, dtype):
    case = problem(dtype=dtype, bias=True)
    expected, gradients = case.gradients(reduction=reduction)

    def step(hidden, weight, bias):
        loss = gft_linear_loss(
            hidden * 1, weight, case.targets, bias=bias, mask=case.mask, rewards=case.rewards, group_size=2,
            reduction=reduction,
        )  # fmt: skip
        return (loss * UPSTREAM).sum(), loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        total, loss = compiled(*case.leaves())
        torch.testing.assert_close(loss, expected)
        for gradient, eager in zip(torch.autograd.grad(total, case.leaves()), gradients, strict=True):
            torch.testing.assert_close(gradient, eager)


def test_the_module_is_the_function():
    case = problem()
    module = GFTLinearLoss(tau=0.4, group_size=2, chunk_rows=5)
    loss = module(case.hidden, case.weight, case.targets, rewards=case.rewards)
    assert loss == gft_linear_loss(
        case.hidden, case.weight, case.targets, rewards=case.rewards, group_size=2, tau=0.4, chunk_rows=5
    )
    assert "tau=0.4" in repr(module)
    with pytest.raises(TypeError, match="inplace must be an option of gft_linear_loss"):
        GFTLinearLoss(inplace=True)


def test_twenty_runs_are_bit_equal(backend):
    case = problem(4, 5, vocabulary=3001)
    loss, gradients = case.gradients(backend=backend, chunk_rows=6)
    for _ in range(19):
        again, others = case.gradients(backend=backend, chunk_rows=6)
        assert torch.equal(again, loss) and all(map(torch.equal, gradients, others))


@pytest.mark.parametrize(
    ("rows", "vocabulary", "bytes_per_logit", "device", "expected"),
    [
        (512, 151936, 4, "cpu", 512),  # 311 MB: all at once
        (8192, 151936, 4, "cpu", 820),  # 883 fit: ten equal chunks
        (8192, 151936, 6, "cuda", 2048),  # 2355 fit: four equal chunks
        (8192, 262144, 6, "cuda", 2048),  # 1365 would fit, but the floor holds
        (5000, 32000, 2, "cuda", 5000),
        (0, 32000, 2, "cuda", 1),
        (7, 0, 4, "cpu", 7),  # an empty shard
    ],
)
def test_the_rule_for_chunks(rows, vocabulary, bytes_per_logit, device, expected):
    assert linear_chunks.chunk_rows(rows, vocabulary, bytes_per_logit, device) == expected


class _Adapter(torch.nn.Module):
    """What peft puts in a linear layer's place."""

    def __init__(self):
        super().__init__()
        self.base_layer = torch.nn.Linear(4, 9)


def _zero3():
    weight = torch.nn.Parameter(torch.empty(0))
    weight.ds_id = 3
    return weight


class _Packed(torch.Tensor):
    """A tensor subclass that stores something else than its numbers."""

    def __tensor_flatten__(self):
        raise NotImplementedError


REFUSED = {
    "adapter": (lambda: {"weight": _Adapter()}, TypeError, "adapter layer _Adapter; merge the adapter"),
    "module": (lambda: {"weight": torch.nn.Linear(4, 9)}, TypeError, "pass its .weight"),
    "no tensor": (lambda: {"weight": [1.0]}, TypeError, "pass lm_head.weight"),
    "zero-3": (lambda: {"weight": _zero3()}, ValueError, "ZeRO-3 parameter of 0 elements; call this inside"),
    "quantised": (lambda: {"weight": torch.zeros(9, 4, dtype=torch.int8)}, TypeError, "keep it unquantised"),
    "packed": (lambda: {"weight": torch.zeros(9, 4).as_subclass(_Packed)}, TypeError, "packs its numbers"),
    "transposed": (lambda: {"weight": torch.zeros(4, 9)}, ValueError, "not its transpose"),
    "one-dimensional": (lambda: {"weight": torch.zeros(9)}, ValueError, r"shape \(V, D\)"),
    "empty": (lambda: {"weight": torch.zeros(0, 4)}, ValueError, "gather it first"),
    "bias": (lambda: {"bias": torch.zeros(4)}, ValueError, r"bias must have shape \(9,\)"),
    "dtypes": (lambda: {"hidden": torch.zeros(3, 4, dtype=torch.bfloat16)}, TypeError, "call under torch.autocast"),
    "double": (lambda: {"hidden": torch.zeros(3, 4, dtype=torch.float64)}, TypeError, "hidden must be float32"),
    "hidden": (lambda: {"hidden": torch.zeros(4)}, ValueError, r"\(S, T, D\) or \(R, D\)"),
    "targets": (lambda: {"targets": torch.tensor([1, 9, 2])}, ValueError, "got 9 at row 1"),
    "chunk_rows": (lambda: {"chunk_rows": 0}, ValueError, "whole number of at least 1, got 0"),
    "accum_dtype": (lambda: {"accum_dtype": torch.bfloat16}, ValueError, "accum_dtype must be torch.float32"),
    "logits_dtype": (lambda: {"logits_dtype": torch.float16}, ValueError, "logits_dtype must be torch.float32"),
    "temperature": (lambda: {"temperature": 0.0}, ValueError, "temperature must be finite and positive"),
    "logit_scale": (lambda: {"logit_scale": 0.0}, ValueError, "logit_scale must be finite and not 0"),
    "backend": (lambda: {"backend": "fast"}, ValueError, "backend must be one of"),
    "inplace": (lambda: {"inplace": True}, TypeError, "inplace"),
    "process_group": (lambda: {"process_group": 3}, TypeError, "process_group must be a torch.distributed.ProcessGroup"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_what_to_do(name):
    wrong, error, sentence = REFUSED[name]
    given = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(9, 4), "targets": torch.tensor([1, 2, 3]), **wrong()}
    with pytest.raises(error, match=sentence):
        gft_linear_loss(**given)


def test_a_dtensor_is_refused():
    weight = torch.zeros(9, 4)
    weight.full_tensor, weight.placements = lambda: weight, ()
    with pytest.raises(TypeError, match=r"weight.full_tensor\(\)"):
        gft_linear_loss(torch.zeros(3, 4), weight, torch.tensor([1, 2, 3]))
