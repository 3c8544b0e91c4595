"""The Triton and CUDA row kernels on a real GPU, through the public function, against float64 on the same GPU.

What a CPU cannot show: alignment faults, 64-bit offsets, many rows, streams, devices, capture, hidden synchronisation.
The options' semantics are covered by `pytest tests/loss/test_loss.py tests/loss/test_autograd.py --device cuda`.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from cases import DTYPES, UPSTREAM

from gft_kernels import backends, gft_loss
from gft_kernels.options import Credit, RowCall

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
    pytest.mark.parametrize("backend", ["triton", "cuda"]),
]
TAU = 0.7
DEVICE = "cuda"


def problem(rows, vocabulary, dtype, seed=0, device=DEVICE):
    """Logits (R, V), targets drawn from the policy they define, advantages of either sign and some 0, a mask."""
    generator = torch.Generator(device=device).manual_seed(seed)
    logits = (torch.randn(rows, vocabulary, device=device, generator=generator) * 3).to(dtype)
    noise = torch.empty(rows, vocabulary, device=device).exponential_(generator=generator).log()
    targets = (logits.float() - noise).argmax(-1)  # the exponential race: a draw from the softmax
    targets[0] = vocabulary - 1
    advantages = torch.randn(rows, device=device, generator=generator)
    advantages[rows // 2 :][: rows > 1] = 0.0  # a single row counts
    mask = torch.rand(rows, device=device, generator=generator) < 0.9
    mask[0] = True
    return logits, targets, advantages, mask


def truth(logits, targets, advantages, weights):
    """(weighted loss per row, gradient) in float64; `weights` (R,) is 0 on rows that do not count."""
    log_pi_RV = torch.log_softmax(logits.double(), -1)
    log_pi = log_pi_RV.gather(1, targets[:, None])[:, 0]
    kappa = advantages.double() * torch.where(log_pi.exp() < TAU, log_pi.exp(), 1.0)
    scale = torch.where(advantages == 0, 0.0, weights.double() * kappa)
    gradient = log_pi_RV.exp_()
    gradient[torch.arange(len(targets)), targets] = torch.expm1(log_pi)
    return -scale * log_pi, gradient * scale[:, None]


def loss_and_gradient(backend, logits, targets, upstream=UPSTREAM, **options):
    leaf = logits.detach().clone().requires_grad_(True)
    loss = gft_loss(leaf * 1 if options.get("inplace") else leaf, targets, tau=TAU, backend=backend, **options)
    (gradient,) = torch.autograd.grad((loss * upstream).sum(), leaf)
    return loss.detach(), gradient


def assert_close(gradient, expected, upstream=UPSTREAM):
    """Two roundings to the dtype an element; in float32 a few units in the last place of the largest logit."""
    expected = expected * upstream
    if gradient.dtype == torch.float32:
        rtol, atol = 2e-5, 1e-7 * float(expected.abs().amax()) + 1e-30
    else:
        info = torch.finfo(gradient.dtype)
        rtol, atol = 1.1 * info.eps, info.tiny  # eps is two roundings
    torch.testing.assert_close(gradient.double(), expected, rtol=rtol, atol=atol)


@contextlib.contextmanager
def nothing_waits():
    """An error where the host waits for the GPU; what compiles and loads has to be over."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_right(backend, rows, vocabulary, dtype, inplace=False, seed=0, device=DEVICE):
    """Loss and gradient of a problem, the mask's rows included."""
    logits, targets, advantages, mask = problem(rows, vocabulary, dtype, seed=seed, device=device)
    loss, gradient = loss_and_gradient(backend, logits, targets, advantages=advantages, mask=mask, inplace=inplace)
    losses, expected = truth(logits, targets, advantages, mask / mask.sum())
    rtol = 1e-5 if rows < 1000 else 1e-4  # a sum in float32
    torch.testing.assert_close(loss.double(), losses.sum(), rtol=rtol, atol=1e-6 * float(losses.abs().sum()) + 1e-30)
    assert_close(gradient, expected)
    assert gradient[~mask].eq(0).all() and gradient.device == logits.device


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("vocabulary", [32000, 50257, 151936, 262144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_and_many_rows(backend, dtype, vocabulary, rows):
    """In whatever launch they choose: at 300 each block or cluster walks over several."""
    assert_right(backend, rows, vocabulary, dtype)


def test_a_row_no_cluster_can_hold(backend):
    assert_right(backend, 3, 1_000_003, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row_stride", [20011, 20012, 20016])
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 5, 7])
def test_rows_at_every_alignment(backend, offset, row_stride, dtype):
    """A promise of alignment that does not hold faults here; what lies between the rows is NaN and stays NaN."""
    vocabulary, rows = 20011, 5
    logits, targets, advantages, _ = problem(rows, vocabulary, dtype, seed=offset)
    storage = torch.full((offset + rows * row_stride + 64,), float("nan"), dtype=dtype, device=DEVICE)
    view = storage.as_strided((rows, vocabulary), (row_stride, 1), offset)
    _, expected = truth(logits, targets, advantages, torch.ones(rows, device=DEVICE))
    outside = torch.ones_like(storage, dtype=torch.bool)
    outside.as_strided(view.shape, view.stride(), offset).fill_(False)
    view.copy_(logits)
    leaf = storage.requires_grad_(True)
    for inplace in (False, True):
        base = leaf * 1
        node = base.as_strided(view.shape, view.stride(), offset)
        options = {"advantages": advantages, "tau": TAU, "reduction": "sum", "inplace": inplace}
        (gradient,) = torch.autograd.grad(gft_loss(node, targets, backend=backend, **options) * UPSTREAM, leaf)
        assert_close(gradient.as_strided(view.shape, view.stride(), offset), expected)
        assert base.detach()[outside].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(
    ("rows", "vocabulary", "row_stride", "offset"),
    [(9, 20011, 20011, 1), (9, 20011, 20012, 2), (700, 128256, 128320, 0), (300, 50257, 50304, 0),
     (200, 1_000_003, 1_000_064, 0)],
)  # fmt: skip
def test_a_gradient_rounded_over_its_logits(backend, rows, vocabulary, row_stride, offset, dtype):
    """What is overwritten has been read, however blocks and warps run, in the cluster and in two passes (the longest):
    the gradient is the float32 one of its own memory, rounded once, and what lies between the rows stays NaN."""
    module = backends.named(backend)
    storage = torch.full((offset + rows * row_stride,), float("nan"), device=DEVICE)
    view = storage.as_strided((1, rows, vocabulary), (0, row_stride, 1), offset)
    view.normal_(std=3.0)
    targets = torch.randint(vocabulary, (rows,), device=DEVICE)
    weights = torch.linspace(-UPSTREAM, UPSTREAM, rows, device=DEVICE)
    weights[rows // 2] = 0.0
    call = RowCall(view, Credit(targets, weights_R=weights, reduction="none"), want_gradient=True)
    alone = module.run(call)
    result = module.run(replace(call, inplace=True, gradient_dtype=dtype))
    info = torch.finfo(dtype)
    torch.testing.assert_close(
        result.gradient_STV.float(), alone.gradient_STV, rtol=0.51 * info.eps, atol=info.tiny * info.eps
    )
    torch.testing.assert_close(result.loss, alone.loss, rtol=1e-5, atol=1e-6)
    assert result.gradient_STV.data_ptr() == view.data_ptr()
    between = storage.as_strided((rows - 1, row_stride - vocabulary), (row_stride, 1), offset + vocabulary)
    assert between.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 77, 1536, 4096, 20011])
def test_a_float32_gradient_is_scaled_and_rounded_at_once(backend, width, dtype):
    gradient, upstream = torch.randn(1, 3000, width, device=DEVICE), torch.full((), UPSTREAM, device=DEVICE)
    scaled = backends.named(backend).scale(gradient, None, upstream, inplace=False, dtype=dtype)
    assert torch.equal(scaled, (gradient * upstream).to(dtype))


def test_more_than_2_to_the_31_logits(backend):
    rows, vocabulary = 14_400, 151_936
    free, _ = torch.cuda.mem_get_info()
    if free < 6 * rows * vocabulary * 2:
        pytest.skip(f"needs {6 * rows * vocabulary * 2 >> 30} GiB of free GPU memory")
    assert rows * vocabulary > 2**31
    leaf = torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    with torch.no_grad():
        leaf.normal_(std=3.0)
    targets = torch.randint(vocabulary, (rows,), device=DEVICE)
    advantages = torch.randn(rows, device=DEVICE)
    for inplace in (False, True):
        node = leaf * 1
        loss = gft_loss(
            node, targets, advantages=advantages, tau=TAU, reduction="sum", inplace=inplace, backend=backend
        )
        (gradient,) = torch.autograd.grad(loss * UPSTREAM, leaf)
        for row in [0, 1, rows // 2, 14_133, 14_134, 14_135, rows - 2, rows - 1]:  # 2^31 lies in row 14,134
            part = slice(row, row + 1)
            one = torch.ones(1, device=DEVICE)
            assert_close(gradient[part], truth(leaf.detach()[part], targets[part], advantages[part], one)[1])
        del gradient, node, loss


def test_seventy_thousand_rows(backend):
    """More than a grid is high."""
    assert_right(backend, 70_000, 64, torch.float32)


def test_in_place_takes_no_memory_of_the_logits_size(backend):
    logits, targets, advantages, _ = problem(512, 151_936, torch.bfloat16)
    held = logits.requires_grad_() * 1
    options = {"advantages": advantages, "inplace": True, "backend": backend}
    gft_loss(logits * 1, targets, **options)  # compiles and loads
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = gft_loss(held, targets, **options)
    assert torch.cuda.max_memory_allocated() - before < 0.01 * logits.nbytes
    assert loss.isfinite()


def test_groups_and_response_means_of_many_responses(backend):
    """1040 responses in ragged groups, 65 rows each in any order: rewards to weights without leaving the GPU."""
    responses, rows = 1040, 67_600
    logits, targets, _, mask = problem(rows, 50, torch.float32)
    rewards = torch.rand(responses, device=DEVICE).round(decimals=1)
    groups = torch.randint(150, (responses,), device=DEVICE)
    ids = torch.randint(responses, (rows,), device=DEVICE)
    options = {"rewards": rewards, "group_ids": groups, "sequence_ids": ids, "mask": mask, "reduction": "sequence-mean"}
    loss, gradient = loss_and_gradient(backend, logits, targets, **options)
    same = groups[:, None] == groups[None, :]
    members = same.sum(1).double()
    mean = (same * rewards[None, :].double()).sum(1) / members
    spread = ((same * (rewards[None, :].double() - mean[:, None]) ** 2).sum(1) / (members - 1).clamp(min=1)).sqrt()
    advantages = torch.where(members == 1, rewards.double(), (rewards.double() - mean) / (spread + 1e-6))
    live = torch.zeros(responses, dtype=torch.double, device=DEVICE).index_add_(0, ids, mask.double())
    weights = mask / (live[ids].clamp(min=1) * (live > 0).sum())
    losses, expected = truth(logits, targets, advantages[ids], weights)
    torch.testing.assert_close(loss.double(), losses.sum(), rtol=1e-4, atol=1e-5 * float(losses.abs().sum()))
    torch.testing.assert_close(gradient.double(), expected * UPSTREAM, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_twenty_runs_are_bit_equal(backend, dtype):
    logits, targets, advantages, mask = problem(300, 50257, dtype)
    first = loss_and_gradient(backend, logits, targets, advantages=advantages, mask=mask)
    for _ in range(19):
        again = loss_and_gradient(backend, logits, targets, advantages=advantages, mask=mask)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_the_current_stream_is_used(backend):
    logits, targets, advantages, mask = problem(64, 50257, torch.bfloat16)
    expected = loss_and_gradient(backend, logits, targets, advantages=advantages, mask=mask)
    side, late = torch.cuda.Stream(), torch.zeros_like(logits)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # a kernel on another stream would read zeros
        late.copy_(logits)
        found = loss_and_gradient(backend, late, targets, advantages=advantages, mask=mask)
    torch.cuda.synchronize()  # `expected` is of the other stream
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_two_streams(backend):
    problems = [problem(400, 32000, torch.bfloat16, seed=seed) for seed in (1, 2)]
    alone = [loss_and_gradient(backend, x, y, advantages=a, mask=m) for x, y, a, m in problems]
    torch.cuda.synchronize()
    streams, together = [torch.cuda.Stream() for _ in problems], []
    for stream, (x, y, a, m) in zip(streams, problems, strict=True):
        with torch.cuda.stream(stream):
            together.append(loss_and_gradient(backend, x, y, advantages=a, mask=m))
    torch.cuda.synchronize()
    for (loss, gradient), (expected_loss, expected) in zip(together, alone, strict=True):
        assert torch.equal(loss, expected_loss) and torch.equal(gradient, expected)


def test_tensors_on_a_device_that_is_not_current(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU")
    torch.cuda.set_device(0)
    assert_right(backend, 9, 50257, torch.bfloat16, device="cuda:1")
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward_never_wait(backend, dtype, inplace):
    logits, targets, _, mask = problem(24, 50257, dtype)
    rewards = torch.rand(8, device=DEVICE)
    sequence_ids = torch.arange(24, device=DEVICE) // 3
    options = {"rewards": rewards, "group_size": 4, "sequence_ids": sequence_ids, "mask": mask, "inplace": inplace}
    loss_and_gradient(backend, logits, targets, **options)  # compiles and loads, which may wait
    upstream = torch.full((), UPSTREAM, device=DEVICE)
    with nothing_waits():
        for reduction in ("token-mean", "sequence-mean"):
            loss_and_gradient(backend, logits, targets, upstream, reduction=reduction, return_stats=False, **options)


@pytest.mark.parametrize("want_gradient", [False, True])
def test_capture_and_replay(backend, want_gradient):
    """A captured step reads new logits, targets, rewards and mask from the old places."""

    def step(logits, targets, advantages, mask):
        loss = gft_loss(logits, targets, advantages=advantages, mask=mask, tau=TAU, backend=backend)
        return loss, *(torch.autograd.grad(loss * UPSTREAM, logits) if want_gradient else ())

    def inputs(seed):
        logits, *others = problem(16, 50257, torch.bfloat16, seed=seed)
        return logits.requires_grad_(want_gradient), *others

    places = inputs(seed=0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(*places)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*places)
    for seed in (5, 6):
        new = inputs(seed)
        with torch.no_grad():
            for old, value in zip(places, new, strict=True):
                old.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, captured, step(*new)))


def test_fifty_lengths_compile_once(backend, tmp_path, monkeypatch):
    """Triton's cache folder holds a file for each variant that was compiled; no other test has this softcap."""
    if backend != "triton":
        pytest.skip("nothing is compiled at run time")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for rows in [1, 2, 16, 17, *range(100, 1300, 26)]:
        logits, targets, advantages, mask = problem(rows, 32001, torch.bfloat16)
        loss_and_gradient(backend, logits, targets, advantages=advantages, mask=mask, softcap=29.0)
    assert len(list(tmp_path.rglob("row_loss_kernel.cubin"))) == 1
    assert len(list(tmp_path.rglob("scale_rows_kernel.cubin"))) <= 1, "none where an earlier test has compiled it"


@pytest.mark.parametrize("bad", [-1, 50257, 2**40])
def test_a_target_out_of_range_spoils_its_row_only(backend, bad):
    logits, targets, advantages, _ = problem(9, 50257, torch.bfloat16)
    _, good = loss_and_gradient(backend, logits, targets, advantages=advantages, reduction="sum")
    targets[3] = bad
    upstream = torch.full((9,), UPSTREAM, device=DEVICE)
    with nothing_waits():
        loss, gradient = loss_and_gradient(backend, logits, targets, upstream, advantages=advantages, reduction="none")
    assert loss[3].isnan() and gradient[3].isnan().all()
    others = torch.arange(9, device=DEVICE) != 3
    assert loss[others].isfinite().all() and torch.equal(gradient[others], good[others])


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e10])
def test_rows_that_do_not_count_are_never_read(backend, poison):
    logits, targets, advantages, mask = problem(9, 50257, torch.bfloat16)
    mask[4:6] = False
    clean = loss_and_gradient(backend, logits, targets, advantages=advantages, mask=mask)
    logits[~mask] = poison
    logits[advantages == 0] = poison
    loss, gradient = loss_and_gradient(backend, logits, targets, advantages=advantages, mask=mask)
    assert torch.equal(loss, clean[0]) and torch.equal(gradient, clean[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_entropy_and_softcap(backend, dtype):
    logits, targets, advantages, mask = problem(9, 50257, dtype)
    _, stats = gft_loss(
        logits, targets, advantages=advantages, mask=mask, tau=TAU, softcap=30.0, temperature=0.8,
        return_stats=True, return_entropy=True, backend=backend,
    )  # fmt: skip
    log_pi_RV = torch.log_softmax(30.0 * torch.tanh(logits.double() / 30.0) / 0.8, -1)
    log_pi = torch.where(mask, log_pi_RV.gather(1, targets[:, None])[:, 0], 0.0)
    entropy = torch.where(mask, -(log_pi_RV.exp() * log_pi_RV).sum(-1), 0.0)
    torch.testing.assert_close(stats.log_probs.double(), log_pi, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
