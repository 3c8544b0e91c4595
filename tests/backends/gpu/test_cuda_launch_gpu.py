"""What only a GPU can show of the CUDA kernels' launch: every cluster size over several rows, and the plan on paper."""

from __future__ import annotations

import pytest
import torch

from gft_kernels import backends
from gft_kernels.backends import cuda
from gft_kernels.options import Credit, RowCall

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA GPU")]


def inputs(rows=6, vocab=50257, dtype=torch.bfloat16, device="cuda", seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.randn(rows, vocab, device=device, generator=generator).to(dtype)
    targets = torch.randint(vocab, (rows,), device=device, generator=generator)
    advantages = torch.randn(rows, device=device, generator=generator)
    return logits, {"targets": targets, "advantages": advantages}


def row_call(logits, options, **wanted) -> RowCall:
    credit = Credit(options["targets"], advantages_R=options["advantages"], tokens_per_response=logits.shape[0])
    return RowCall(logits[None], credit, want_gradient=True, **wanted)


@pytest.fixture
def cuda_kernels():
    if (reason := cuda.absent()) is not None:
        pytest.skip(reason)
    return cuda


@pytest.mark.parametrize("blocks", [1, 2, 4, 5, 7, 8, 16])
@pytest.mark.parametrize("inplace", [False, True])
def test_every_cluster_size_over_several_rows(cuda_kernels, blocks, inplace):
    """Two clusters walk over 7 rows, so that each block's buffers are used again, and again."""
    logits, options = inputs(rows=7, vocab=32003)
    reference = backends.named("reference").run(row_call(logits.clone(), options))
    result = cuda_kernels.run(row_call(logits.clone(), options, inplace=inplace), cluster=blocks, clusters=2)
    torch.testing.assert_close(result.loss, reference.loss, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.gradient_STV, reference.gradient_STV, rtol=2e-2, atol=1e-8)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9, reason="needs clusters of blocks"
)
@pytest.mark.parametrize(
    ("vocab", "dtype", "blocks", "threads"),
    [(32000, torch.bfloat16, 1, 384), (50257, torch.bfloat16, 2, 256), (128256, torch.bfloat16, 4, 384),
     (151936, torch.bfloat16, 6, 256), (151936, torch.float32, 9, 384), (262144, torch.bfloat16, 7, 384)],
)  # fmt: skip
def test_the_plan_is_the_one_on_paper(cuda_kernels, vocab, dtype, blocks, threads):
    """And the device refuses nothing: a refusal would fall to the two-pass kernel without a word."""
    logits, options = inputs(rows=1, vocab=vocab, dtype=dtype)
    call = row_call(logits.expand(8192, -1), options)
    plan = cuda_kernels.plan(call)
    assert (plan["kernel"], plan["refused"]) == ("cluster_row", None)
    if "H200" in torch.cuda.get_device_name():  # others hold other numbers of clusters
        assert (plan["cluster"], plan["threads"]) == (blocks, threads)
        places = 1152 // threads * torch.cuda.get_device_properties(0).multi_processor_count
        assert plan["resident"] * blocks >= 0.8 * places, "three or four on each, but for what a GPC has over"
