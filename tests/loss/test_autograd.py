"""What autograd, torch.compile, checkpointing and autocast ask of the operators."""

from __future__ import annotations

import weakref

import pytest
import torch
from cases import UPSTREAM, problem, run
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from gft_kernels import gft_linear_loss, gft_loss, policy_loss
from gft_kernels.operators import row

ONCE = pytest.mark.parametrize("backend", ["auto"])
"""For what the operators decide, whichever backend they ask."""


def bound(case, backend, device, **options):
    """gft_loss of a problem as a function of the logits alone."""
    case = type(case)(*(x.to(device) for x in (case.logits, case.targets, case.mask, case.rewards)), case.group_size)
    return lambda z: gft_loss(
        z, case.targets, mask=case.mask, rewards=case.rewards, group_size=2, backend=backend, **options
    )


def test_a_retained_graph_can_be_walked_again(backend, device):
    """A peer rescales its saved gradient in place: the second walk is then off by the first one's factor."""
    case = problem()
    leaf = case.logits.to(device).requires_grad_(True)
    loss = bound(case, backend, device)(leaf)
    walks = [torch.autograd.grad(loss * factor, leaf, retain_graph=True)[0] for factor in (1.0, 3.0, 1.0, 0.5)]
    for walk, factor in zip(walks, (1.0, 3.0, 1.0, 0.5), strict=True):
        torch.testing.assert_close(walk, walks[0] * factor)
    assert not torch.equal(walks[1], walks[0])


def test_in_place_a_second_walk_is_refused(backend, device):
    leaf = problem().logits.to(device).requires_grad_(True)
    loss = bound(problem(), backend, device, inplace=True)(leaf * 1)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace must be False for a graph walked backward more than once"):
        loss.backward()


def test_in_place_takes_the_logits_storage(backend, device):
    case = problem()
    leaf = case.logits.to(device).requires_grad_(True)
    logits = leaf * 1
    storage, seen = logits.data_ptr(), []
    logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    (UPSTREAM * bound(case, backend, device, inplace=True)(logits)).backward()
    assert seen == [storage]


def test_in_place_is_seen_by_whoever_saved_the_logits(backend, device):
    case = problem()
    logits = case.logits.to(device).requires_grad_(True) * 1
    probabilities = torch.exp(logits * 1)  # exp saves its output, softmax of logits would too
    entropy = (logits * probabilities).sum()  # mul saves the logits
    loss = bound(case, backend, device, inplace=True)(logits)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + entropy).backward()


def test_out_of_place_leaves_the_logits_alone(backend, device):
    case = problem()
    logits = case.logits.to(device).requires_grad_(True) * 1
    before = logits.detach().clone()
    loss = bound(case, backend, device)(logits)
    (3 * loss + logits.square().sum()).backward()
    assert torch.equal(logits.detach(), before)


@pytest.mark.parametrize("inplace", [False, True])
def test_without_gradients_nothing_is_materialised(backend, device, inplace, monkeypatch):
    calls = []
    real = row.backends.choose
    monkeypatch.setattr(row.backends, "choose", lambda name, call: calls.append(call) or real(name, call))
    case = problem()
    leaf = case.logits.to(device).requires_grad_(True)
    with torch.no_grad():
        quiet = bound(case, backend, device, inplace=inplace)(leaf)
    frozen = bound(case, backend, device, inplace=inplace)(leaf.detach())
    assert [call.want_gradient for call in calls] == [False, False]
    assert torch.equal(leaf.detach().cpu(), case.logits), "in place without a gradient leaves the logits alone"
    loud = bound(case, backend, device)(leaf)
    assert torch.equal(quiet, frozen) and not quiet.requires_grad
    # the cuda backend's kernel for statistics alone adds up in another order; an ulp of a row's loss is allowed
    torch.testing.assert_close(quiet, loud.detach(), rtol=0.0, atol=2.0**-20 if backend == "cuda" else 0.0)


def of_head(logits, reduction, backend):
    """The linear loss whose hidden states are the logits: the head is the unit matrix."""
    head = torch.eye(logits.shape[-1], device=logits.device)
    targets = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    return gft_linear_loss(logits * 1, head, targets, reduction=reduction, backend=backend).sum()


def of_copy(function):
    return lambda z: function(z * 1)


LOSSES = {
    "out of place": lambda backend, device: bound(problem(), backend, device),
    "in place": lambda backend, device: of_copy(bound(problem(), backend, device, inplace=True)),
    "linear": lambda backend, device: lambda z: of_head(z, "token-mean", backend),
    "linear per row": lambda backend, device: lambda z: of_head(z, "none", backend),
}


@ONCE
@pytest.mark.parametrize("upstream", [1.0, 2.0, "live"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_second_derivative_is_an_error(backend, device, loss, upstream):
    """A gradient penalty would add nothing: the usual upstream, 1, needs no gradient, and autograd is then silent."""
    leaf = problem().logits.to(device).requires_grad_(True)
    factor = torch.tensor(2.0, device=device, requires_grad=True) if upstream == "live" else upstream
    value = LOSSES[loss](backend, device)(leaf) * factor
    (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
    (plain,) = torch.autograd.grad(LOSSES[loss](backend, device)(leaf) * factor, leaf)
    assert torch.equal(gradient.detach(), plain), "create_graph alone changes nothing"
    with pytest.raises(RuntimeError, match=r"the loss must be differentiated once, got a derivative of its gradient"):
        (leaf.sum() + gradient.square().sum()).backward()


def penalty(**unused):
    """The gradient of a gradient alone, which no other term leads back to the input."""

    def ask(function, z):
        leaf = z.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(function(leaf) * 2.5, leaf, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), leaf, **unused)

    return ask


def by_the_upstream(function, z):
    leaf, factor = z.clone().requires_grad_(True), torch.tensor(2.5, device=z.device, requires_grad=True)
    (gradient,) = torch.autograd.grad(function(leaf) * factor, leaf, create_graph=True)
    return torch.autograd.grad(gradient.sum(), factor)


SECOND = {
    "hvp": lambda function, z: torch.autograd.functional.hvp(function, z, z),
    "vhp": lambda function, z: torch.autograd.functional.vhp(function, z, z),
    "jvp": lambda function, z: torch.autograd.functional.jvp(function, z, z),
    "hessian": lambda function, z: torch.autograd.functional.hessian(function, z),
    "beside a cubic": lambda function, z: torch.autograd.functional.hvp(lambda x: function(x) + x.pow(3).sum(), z, z),
    "penalty": penalty(),
    "penalty, unused allowed": penalty(allow_unused=True),
    "penalty, zeros for unused": penalty(materialize_grads=True),
    "by the upstream": by_the_upstream,
}


@ONCE
@pytest.mark.parametrize("loss", [*LOSSES, "half precision", "per row"])
@pytest.mark.parametrize("ask", SECOND)
def test_no_way_of_asking_for_a_second_derivative_gives_zeros(backend, device, loss, ask):
    function = {
        "half precision": lambda z: bound(problem(), backend, device)(z.half()),
        "per row": lambda z: bound(problem(), backend, device, reduction="none")(z).sum(),
    }.get(loss) or LOSSES[loss](backend, device)
    with pytest.raises(RuntimeError, match=r"the loss must be differentiated once, got a derivative of its gradient"):
        SECOND[ask](function, problem().logits.to(device))


def test_the_way_back_holds_no_logits(backend, device):
    leaf = problem().logits.to(device).requires_grad_(True)
    logits = leaf * 1
    storage = weakref.ref(logits.untyped_storage())
    loss = bound(problem(), backend, device)(logits)
    del logits
    assert storage() is None and loss.requires_grad


@ONCE
@pytest.mark.parametrize("loss", LOSSES)
def test_forward_mode_and_torch_func_are_errors(backend, device, loss):
    function, z = LOSSES[loss](backend, device), problem().logits.to(device)
    for needs_gradient in (False, True):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(z.clone().requires_grad_(needs_gradient), torch.ones_like(z))
            with pytest.raises(RuntimeError, match="the loss must be differentiated in reverse mode, got a forward"):
                function(dual)
            with torch.no_grad():
                function(z.clone())  # no tangent, no complaint
    with pytest.raises(RuntimeError, match=r"outside torch.func, got a derivative with jvp"):
        torch.func.jvp(function, (z,), (z,))
    with pytest.raises(RuntimeError, match=r"outside torch.func, got a derivative with grad"):
        torch.func.grad(function)(z)
    batch = torch.stack([z, 2 * z])
    with pytest.raises(RuntimeError, match=r"outside torch.func, got a derivative with vmap"):
        torch.func.vmap(function)(batch.clone().requires_grad_(True))


def of_a_dual(function, z):
    function(z)  # compiled without a tangent first
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(z, torch.ones_like(z)))


TRACED = {
    "jvp": ("outside torch.func, got a derivative with jvp", lambda function, z: torch.func.jvp(function, (z,), (z,))),
    "grad": ("outside torch.func, got a derivative with grad", lambda function, z: torch.func.grad(function)(z)),
    "dual": ("in reverse mode, got a forward-mode tangent", of_a_dual),
    "hvp": ("once, got a derivative of its gradient", lambda f, z: torch.autograd.functional.hvp(f, z, z)),
}


@ONCE
@pytest.mark.parametrize(  # around a graph break torch.func's two ways are one, and tracing each takes seconds
    ("ask", "fullgraph"), [("jvp", False), ("dual", False), ("hvp", False), ("grad", True), ("hvp", True)]
)
def test_compiling_hides_no_refusal(backend, device, ask, fullgraph):
    """With fullgraph the refusal may be torch.compile's own; a second derivative is refused where the graph is run."""
    torch._dynamo.reset()
    sentence, take = TRACED[ask]
    z, function = problem().logits.to(device), LOSSES["out of place"](backend, device)
    compiled = torch.compile(function, backend="eager", fullgraph=fullgraph)
    if ask in ("jvp", "grad"):
        compiled = function
        take = torch.compile(lambda f, x: TRACED[ask][1](f, x), backend="eager", fullgraph=fullgraph)
    with pytest.raises(RuntimeError, match=None if fullgraph else f"the loss must be differentiated {sentence}"):
        take(compiled, z)


@pytest.mark.parametrize("loss", LOSSES)
def test_what_backward_hands_out_is_the_callers_own(backend, device, loss):
    """Changed in place, or added to by the next walk, it leaves what the graph saved alone."""
    leaf = problem().logits.to(device).requires_grad_(True)
    logits = leaf * 1
    seen = []
    logits.register_hook(seen.append)
    value = LOSSES[loss](backend, device)(logits)
    if loss == "in place":
        value.backward()
        assert seen[0].grad_fn is None and not seen[0].requires_grad
        return
    value.backward(retain_graph=True)
    once = leaf.grad.clone()
    leaf.grad.mul_(3.0)
    seen[0].mul_(5.0)
    for _ in range(2):
        value.backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, 5.0 * once)


def saved_by(loss):
    """The gradient that a loss's graph holds."""
    node = loss.grad_fn
    while not hasattr(node, "saved_tensors"):
        node = node.next_functions[0][0]
    return node.saved_tensors[0]


WALKED_ONCE = {"plain": {}, "half precision": {"dtype": torch.float16}, "per row": {"reduction": "none"}}


@pytest.mark.parametrize("options", WALKED_ONCE.values(), ids=WALKED_ONCE)
@pytest.mark.parametrize("upstream", [1.0, UPSTREAM])
def test_a_dropped_graph_hands_out_its_gradient_where_it_lies(backend, device, options, upstream):
    """No second tensor of the logits' size; a graph that is kept is walked first, and has its own left alone."""
    options = dict(options)
    case = problem(dtype=options.pop("dtype", torch.float32))
    leaf = case.logits.to(device).requires_grad_(True)
    loss = bound(case, backend, device, **options)(leaf)
    storage, gradients = saved_by(loss).data_ptr(), torch.full_like(loss, upstream)
    (kept,) = torch.autograd.grad(loss, leaf, gradients, retain_graph=True)
    loss.backward(gradients)
    assert leaf.grad.data_ptr() == storage != kept.data_ptr()
    assert torch.equal(leaf.grad, kept)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward(gradients)


def test_a_dropped_graph_adds_to_what_is_there(backend, device):
    """Gradients of a leaf and of a value between that has two consumers, over two batches."""
    leaf = problem().logits.to(device).requires_grad_(True)
    (alone,) = torch.autograd.grad(bound(problem(), backend, device)(leaf), leaf)
    for _ in range(2):
        logits = leaf * 2
        logits.retain_grad()
        loss = bound(problem(), backend, device)(logits / 2)
        (UPSTREAM * loss + 0.5 * loss + logits.sum()).backward()
        torch.testing.assert_close(logits.grad, (UPSTREAM + 0.5) / 2 * alone + 1)
    torch.testing.assert_close(leaf.grad, 2 * (UPSTREAM + 0.5) * alone + 4)


class Names(TorchDispatchMode):
    """The operators that ran."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("inplace", "name"), [(False, "gft.row_loss.default"), (True, "gft.row_loss_.default")])
def test_who_watches_sees_one_operator(backend, device, inplace, name):
    """Selective checkpointing and tracers live on that; nobody else pays for it."""
    function, z = bound(problem(), backend, device, inplace=inplace), problem().logits.to(device)
    alone, expected = run(function, z)
    with Names() as names:
        watched, gradient = run(function, z)
    assert names.seen.count(name) == 1
    assert torch.equal(watched, alone) and torch.equal(gradient, expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_checkpointing(backend, device, inplace):
    case = problem()
    function = bound(case, backend, device, inplace=inplace)
    _, expected = run(function, case.logits.to(device))
    for reentrant in (False, True):
        _, gradient = run(
            lambda z, r=reentrant: checkpoint(lambda x: function(x * 1), z, use_reentrant=r), case.logits.to(device)
        )
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_loss_in_float32(backend, device, dtype):
    case = problem(dtype=dtype)
    with torch.autocast(device.type, dtype=dtype):
        inside, gradient = run(bound(case, backend, device), case.logits.to(device))
    outside, expected = run(bound(case, backend, device), case.logits.to(device))
    assert inside.dtype == torch.float32 and torch.equal(inside, outside)
    assert gradient.dtype == dtype and torch.equal(gradient, expected)


@ONCE
@pytest.mark.parametrize(
    ("inplace", "dtype"), [(False, torch.float32), (True, torch.float32), (False, torch.float16)], ids=str
)
def test_compiles_without_a_graph_break(backend, device, inplace, dtype):
    torch._dynamo.reset()
    case = problem(dtype=dtype)
    function = bound(case, backend, device, inplace=inplace)
    expected = run(lambda z: function(z * 2) * 0.5, case.logits.to(device))
    compiled = torch.compile(lambda z: function(z * 2) * 0.5, fullgraph=True, backend="aot_eager")
    loss, gradient = run(compiled, case.logits.to(device))
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(gradient, expected[1])


@ONCE
def test_many_lengths_compile_at_most_twice(backend, device):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda z, y: gft_loss(z * 2, y, tau=0.3, backend=backend), fullgraph=True, backend=counter)
    for rows in range(3, 53):
        z = torch.randn(rows, 19, device=device, requires_grad=True)
        compiled(z, torch.zeros(rows, dtype=torch.long, device=device)).backward()
        assert z.grad.isfinite().all()
    assert counter.frame_count <= 2


@ONCE
@pytest.mark.parametrize("inplace", [False, True])
def test_shapes_and_options_that_change_compile(backend, device, inplace):
    """Strides and numbers are then symbols: they can be compared, but neither sorted nor written out."""
    torch._dynamo.reset()

    def loss(z, y, items, number):
        minus_one = torch.full(y.shape, -1.0, device=y.device)
        options = {"objective": "grpo", "advantages": minus_one, "old_log_probs": 3 * minus_one}
        options |= {"num_items_in_batch": items, "delta": number, "reduction": "token-mean", "beta": number}
        options |= {"ref_log_probs": 2 * minus_one, "temperature": number, "clip_high": number / 4}
        return 1.7 * policy_loss(z * 2, y, inplace=inplace, backend=backend, **options)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for s, t, items, number in ((4, 3, 3, 2.0), (6, 5, 4, 3.5), (2, 9, 9, 2.5), (8, 2, 5, 4.0)):
        z, y = torch.randn(s, t, 19, device=device), torch.zeros(s, t, dtype=torch.long, device=device)
        found = run(lambda x, c=(y, items, number): compiled(x, *c), z)
        torch.testing.assert_close(found, run(lambda x, c=(y, items, number): loss(x, *c), z))


@ONCE
@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "in place"])
def test_many_backwards_at_once(backend, device, loss):
    """is_grads_batched wraps the upstream: whether it is 1 cannot be asked."""
    leaf = problem().logits.to(device).requires_grad_(True)
    value = LOSSES[loss](backend, device)(leaf)
    upstreams = torch.tensor([1.0, 3.0], device=device)
    (single,) = torch.autograd.grad(value, leaf, retain_graph=True)
    (batched,) = torch.autograd.grad(value, leaf, upstreams, is_grads_batched=True)
    torch.testing.assert_close(batched, torch.stack([single, 3 * single]))


def operator_arguments(dtype, monkeypatch, **options):
    """What `gft_loss` hands to its operator."""
    case, captured, pack = problem(dtype=dtype), [], row._pack
    leaf = case.logits.requires_grad_(True)
    with monkeypatch.context() as patched:
        patched.setattr(row, "is_watched", lambda *inputs: True)
        patched.setattr(row, "_pack", lambda *call: captured.append(pack(*call)) or captured[-1])
        bound(case, "reference", leaf.device, **options)(leaf)
    return (leaf, *captured[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"reduction": "none", "return_entropy": True}, {"inplace": False, "softcap": 5.0}]
)
def test_opcheck_of_the_functional_operator(dtype, options, monkeypatch):
    torch.library.opcheck(torch.ops.gft.row_loss.default, operator_arguments(dtype, monkeypatch, **options))


def test_opcheck_of_the_mutating_operators(monkeypatch):
    logits, *arguments = operator_arguments(torch.float32, monkeypatch)
    torch.library.opcheck(torch.ops.gft.row_loss_.default, (logits.detach(), *arguments))
    gradient, row_scale = torch.randn(2, 3, 5), torch.rand(6)
    torch.library.opcheck(torch.ops.gft.scale.default, (gradient, row_scale, torch.rand(6), "reference"))
    torch.library.opcheck(
        torch.ops.gft.scale.default, (gradient, row_scale, torch.rand(6), "reference", torch.bfloat16)
    )
    torch.library.opcheck(torch.ops.gft.scale_.default, (gradient, row_scale, torch.tensor(2.0), "reference"))
