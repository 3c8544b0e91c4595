"""What only a GPU can show, for both GPU backends: synchronisation, streams, graphs, sizes, memory.

The loss's own tests run there with `pytest tests --device cuda`.
"""

from __future__ import annotations

import pytest
import torch

from gft_kernels import gft_loss, registry
from gft_kernels.backends import cuda
from gft_kernels.options import Credit, RowCall

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA GPU"),
]


@pytest.fixture(params=["cuda", "triton"])
def kernels(request) -> str:
    """A GPU backend that is ready here; not called `backend`, which follows --device."""
    if (reason := registry.backend(request.param).absent()) is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


def inputs(rows=6, vocab=50257, dtype=torch.bfloat16, device="cuda", seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.randn(rows, vocab, device=device, generator=generator).to(dtype)
    targets = torch.randint(vocab, (rows,), device=device, generator=generator)
    advantages = torch.randn(rows, device=device, generator=generator)
    return logits, {"targets": targets, "advantages": advantages}


def step(kernels, logits, upstream=None, **options):
    """Loss and gradient; the upstream gradient is a tensor on the device."""
    leaf = logits.detach().requires_grad_()
    loss = gft_loss(leaf * 1, backend=kernels, **options)
    loss.backward(torch.full_like(loss, 1.7) if upstream is None else upstream)
    return loss.detach(), leaf.grad


def assert_like_the_reference(kernels, logits, rtol=2e-2, atol=1e-8, **options):
    ours, reference = step(kernels, logits, **options), step("reference", logits, **options)
    torch.testing.assert_close(ours[0], reference[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours[1], reference[1], rtol=rtol, atol=atol)


@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_waits_for_the_gpu(kernels, inplace):
    logits, options = inputs()
    options |= {"inplace": inplace, "return_stats": False}
    upstream = torch.tensor(1.7, device="cuda")
    step(kernels, logits, upstream, **options)  # compiles, loads, allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(kernels, logits, upstream, **options)
        step(
            kernels,
            logits,
            upstream,
            **options | {"reduction": "sequence-mean", "sequence_ids": options["targets"] * 0},
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("want_gradient", [False, True])
def test_a_captured_call_replays_on_new_logits(kernels, want_gradient):
    logits, options = inputs()
    credit = Credit(options["targets"], advantages_R=options["advantages"], tokens_per_response=logits.shape[0])
    call = RowCall(logits[None], credit, want_gradient=want_gradient, want_stats=True)
    module = registry.backend(kernels)
    module.run(call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = module.run(call)
    logits.copy_(inputs(seed=1)[0])
    graph.replay()
    fresh = module.run(call)
    torch.cuda.synchronize()
    assert torch.equal(captured.loss, fresh.loss) and torch.equal(captured.log_probs_R, fresh.log_probs_R)
    if want_gradient:
        assert torch.equal(captured.gradient_STV, fresh.gradient_STV)


def test_the_current_stream_is_used(kernels):
    logits, options = inputs(rows=64)
    expected = step(kernels, logits, **options)
    side = torch.cuda.Stream()
    late = torch.zeros_like(logits)
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # a kernel on another stream would read zeros
        late.copy_(logits)
        result = step(kernels, late, **options)
    torch.cuda.synchronize()  # `expected` is of the other stream
    assert torch.equal(result[0], expected[0]) and torch.equal(result[1], expected[1])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_the_tensors_device_is_used(kernels):
    logits, options = inputs(device="cuda:1")
    with torch.cuda.device(0):
        assert_like_the_reference(kernels, logits, **options)


def test_more_rows_than_a_grid_is_high(kernels):
    logits, options = inputs(rows=70_001, vocab=67, dtype=torch.float32)
    assert_like_the_reference(kernels, logits, rtol=1e-4, **options)


def test_more_logits_than_32_bits_count(kernels):
    """N·V = 2.2e9: the last rows lie past 2^31."""
    rows, vocab = 14_600, 151_936
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs 12 GB of free GPU memory")
    logits = torch.empty(rows, vocab, device="cuda", dtype=torch.bfloat16).normal_()
    targets = torch.randint(vocab, (rows,), device="cuda")
    last = logits[-5:].clone()
    loss = gft_loss(logits.requires_grad_() * 1, targets, reduction="sum", inplace=True, backend=kernels)
    loss.backward()
    gradient = logits.grad[-5:]
    expected = step(
        "reference", last, upstream=torch.tensor(1.0, device="cuda"), targets=targets[-5:], reduction="sum"
    )[1]
    torch.testing.assert_close(gradient, expected, rtol=2e-2, atol=1e-8)


def test_a_row_no_cluster_can_hold(kernels):
    logits, options = inputs(rows=3, vocab=1_000_003, dtype=torch.float32)
    assert_like_the_reference(kernels, logits, rtol=1e-4, **options)


@pytest.mark.parametrize("rows", [1, 16, 300])
@pytest.mark.parametrize("vocab", [32000, 50257, 151936, 262144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_vocabulary(kernels, dtype, vocab, rows):
    """Few and many rows, in whatever launch they choose."""
    logits, options = inputs(rows, vocab, dtype)
    assert_like_the_reference(kernels, logits, rtol=1e-4 if dtype == torch.float32 else 2e-2, **options)


def row_call(logits, options, **wanted) -> RowCall:
    credit = Credit(options["targets"], advantages_R=options["advantages"], tokens_per_response=logits.shape[0])
    return RowCall(logits[None], credit, want_gradient=True, **wanted)


@pytest.fixture
def cuda_kernels():
    if (reason := cuda.absent()) is not None:
        pytest.skip(reason)
    return cuda


@pytest.mark.parametrize("blocks", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("inplace", [False, True])
def test_every_cluster_size_over_several_rows(cuda_kernels, blocks, inplace):
    """Two clusters walk over 7 rows, so that each block's buffers are used again, and again."""
    logits, options = inputs(rows=7, vocab=32003)
    reference = registry.backend("reference").run(row_call(logits.clone(), options))
    result = cuda_kernels.run(row_call(logits.clone(), options, inplace=inplace), cluster=blocks, clusters=2)
    torch.testing.assert_close(result.loss, reference.loss, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.gradient_STV, reference.gradient_STV, rtol=2e-2, atol=1e-8)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9, reason="needs clusters of blocks"
)
@pytest.mark.parametrize(
    ("vocab", "dtype", "blocks"),
    [(32000, torch.bfloat16, 1), (50257, torch.bfloat16, 1), (151936, torch.bfloat16, 4), (151936, torch.float32, 8),
     (262144, torch.bfloat16, 8)],
)  # fmt: skip
def test_the_plan_is_the_one_on_paper(cuda_kernels, vocab, dtype, blocks):
    """And the device refuses nothing: a refusal would fall to the two-pass kernel without a word."""
    logits, options = inputs(rows=1, vocab=vocab, dtype=dtype)
    call = row_call(logits.expand(8192, -1), options)
    plan = cuda_kernels.plan(call)
    assert (plan["kernel"], plan["cluster"], plan["threads"], plan["refused"]) == ("cluster_row", blocks, 512, None)
    if any(name in torch.cuda.get_device_name() for name in ("H100", "H200")):
        places = 2 * torch.cuda.get_device_properties(0).multi_processor_count
        assert plan["resident"] * blocks >= 0.85 * places, "two blocks on each, but for what a GPC has over"


def test_in_place_takes_no_memory_of_the_logits_size(kernels):
    logits, options = inputs(rows=512, vocab=151_936)
    leaf = logits.requires_grad_()
    gft_loss(leaf * 1, inplace=True, backend=kernels, **options).backward()
    leaf.grad = None
    held = leaf * 1
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = gft_loss(held, inplace=True, backend=kernels, **options)
    assert torch.cuda.max_memory_allocated() - before < 0.01 * logits.nbytes
    assert loss.isfinite()


def test_a_bad_target_is_nan_in_its_row_without_a_wait(kernels):
    logits, options = inputs(rows=4, vocab=1003)
    options["targets"][2] = 1003
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, gradient = step(kernels, logits, reduction="none", **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isnan().tolist() == [False, False, True, False]
    assert gradient.isnan().all(1).tolist() == [False, False, True, False]
