"""Which gradients the linear loss computes, which rows reach a product, and what may be done with its graph."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path

import pytest
import torch
from cases import DTYPES, UPSTREAM, assert_loss
from linear_cases import problem, relative

from gft_kernels import gft_linear_loss, gft_loss
from gft_kernels.linear import chunks
from gft_kernels.operators import linear as linear_operator
from gft_kernels.operators import row

pytestmark = pytest.mark.usefixtures("on_device")


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("reduction", ["token-mean", "none"])
def test_only_the_gradients_asked_for(monkeypatch, wanted, reduction):
    """A frozen head or trunk costs no product, and gets no gradient."""
    case = problem(bias=True)
    _, truth = case.truth(reduction=reduction)
    for leaf, want in zip(case.leaves(), wanted, strict=True):
        leaf.requires_grad_(want)
    made = []
    multiply = chunks.multiply
    monkeypatch.setattr(chunks, "multiply", lambda *a, **k: (made.append("head"), multiply(*a, **k)))
    head = chunks.Head
    gradient = head.hidden_gradient
    monkeypatch.setattr(head, "hidden_gradient", lambda *a: (made.append("hidden"), gradient(*a)))
    loss = case.loss(reduction=reduction)
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        (loss * UPSTREAM).sum().backward()
    assert made == ["hidden"] * wanted[0] + ["head"] * wanted[1]
    for leaf, want, expected in zip(case.leaves(), wanted, truth, strict=True):
        assert (leaf.grad is not None) == want
        if want:
            assert relative(leaf.grad, expected) < 1e-5


@pytest.mark.parametrize("options", [{}, {"filter_eps": 1e-3, "return_stats": True}, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("neighbours", [True, False])
def test_where_every_row_counts_none_is_gathered_or_scattered(monkeypatch, backend, neighbours, options):
    """Neighbours in memory are not copied either; those that are not still meet their own targets."""
    case = problem(bias=True)
    case.mask.fill_(True)
    case.targets[-1, -1] = 5
    if not neighbours:
        case.hidden = torch.cat([case.hidden, case.hidden[:, :1] * 1e3], 1).detach()[:, :3].requires_grad_(True)
    seen, rows = [], chunks._ChunkedLoss._hidden
    monkeypatch.setattr(torch, "argsort", None)
    monkeypatch.setattr(chunks._ChunkedLoss, "_hidden", lambda self, x: (seen.append(rows(self, x)), seen[-1])[1])
    out, gradients = case.gradients(backend=backend, chunk_rows=5, **options)
    losses, truth = case.truth(reduction=options.get("reduction", "token-mean"))
    assert_loss((out[0] if isinstance(out, tuple) else out).sum(), losses)
    for gradient, expected in zip(gradients, truth, strict=True):
        assert relative(gradient, expected) < (2e-3 if "filter_eps" in options else 1e-5)
    copied = [x.untyped_storage().data_ptr() != case.hidden.untyped_storage().data_ptr() for x in seen]
    assert copied == [not neighbours] * len(seen) and len(seen) >= 3


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
    logits = chunks.Head.logits

    def counted(self, hidden_CD, out_CV):
        rows.append(len(hidden_CD))
        logits(self, hidden_CD, out_CV)

    monkeypatch.setattr(chunks.Head, "logits", counted)
    live = case.mask & (case.targets != -100)
    case.loss()
    assert sum(rows) == int(live[2:].sum())
    rows.clear()
    case.loss(return_stats=True)
    assert sum(rows) == int(live.sum())


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


@pytest.mark.parametrize("reduction", ["token-mean", "none"])
def test_gradients_asked_for_one_at_a_time(reduction):
    case = problem(bias=True)
    _loss, together = case.gradients(reduction=reduction)
    for leaf, expected in zip(case.leaves(), together, strict=True):
        (alone,) = torch.autograd.grad((case.loss(reduction=reduction) * UPSTREAM).sum(), [leaf])
        assert torch.equal(alone, expected)


def test_the_upstream_scales_a_loss_among_others():
    case = problem()
    (3.0 * case.loss() + case.hidden.square().sum()).backward()
    _, (expected, _) = case.gradients(3.0)
    torch.testing.assert_close(case.hidden.grad, expected + 2 * case.hidden.detach())


def test_double_backward_is_an_error():
    case = problem()
    (gradient,) = torch.autograd.grad(case.loss() * 2.0, [case.hidden], create_graph=True)
    with pytest.raises(RuntimeError, match=r"the loss must be differentiated once, got a derivative"):
        gradient.sum().backward()


def test_twenty_runs_are_bit_equal(backend):
    case = problem(4, 5, vocabulary=3001)
    loss, gradients = case.gradients(backend=backend, chunk_rows=6)
    for _ in range(19):
        again, others = case.gradients(backend=backend, chunk_rows=6)
        assert torch.equal(again, loss) and all(map(torch.equal, gradients, others))


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"filter_eps": 1e-3}], ids=str)
def test_the_operator_and_the_short_way_past_it_agree(monkeypatch, backend, options):
    case, operators, operator = problem(bias=True), [], linear_operator._operator
    monkeypatch.setattr(linear_operator, "_operator", lambda *call: operators.append(call) or operator(*call))
    loss, gradients = case.gradients(backend=backend, **options)
    assert operators == []
    monkeypatch.setattr(row, "is_watched", lambda *inputs: True)
    again, others = case.gradients(backend=backend, **options)
    assert len(operators) == (2 if options.get("reduction") == "none" else 1)
    assert torch.equal(again, loss) and all(map(torch.equal, others, gradients))


def operator_arguments(monkeypatch, dtype, **options):
    """The operator's arguments as the public function makes them."""
    captured, pack = [], linear_operator._pack
    with monkeypatch.context() as patched:
        patched.setattr(row, "is_watched", lambda *inputs: True)
        patched.setattr(linear_operator, "_pack", lambda *call: captured.append(pack(*call)) or captured[-1])
        problem(dtype=dtype, bias=True).loss(backend="reference", **options)
    return captured[0]


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"return_entropy": True, "chunk_rows": 5}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck(monkeypatch, dtype, options):
    torch.library.opcheck(torch.ops.gft.linear_loss.default, operator_arguments(monkeypatch, dtype, **options))


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


def test_lengths_share_two_graphs():
    """A length baked into the graph would compile a new one for every batch."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    weight = torch.randn(19, 8, requires_grad=True)
    compiled = torch.compile(lambda x, y: gft_linear_loss(x * 2, weight, y), fullgraph=True, backend=counter)
    for rows in range(3, 23):
        x = torch.randn(rows, 8, requires_grad=True)
        compiled(x, torch.zeros(rows, dtype=torch.long)).backward()
        assert x.grad.isfinite().all()
    assert counter.frame_count <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_is_waited_for_once(device, dtype):
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    case, upstream = problem(4, 3, 64, 1003, dtype), torch.tensor(2.0)  # whose copy to the GPU waits too
    case.gradients(upstream)  # loads kernels and asks what the device can do
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            case.gradients(upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [f"{Path(w.filename).name}:{w.lineno}" for w in told if "synchroniz" in str(w.message)]
    assert len(waits) == 1 and waits[0].startswith("chunks.py:"), waits
