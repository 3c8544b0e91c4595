"""Small calls of every CUDA kernel, for compute-sanitizer: `compute-sanitizer --tool racecheck python -m ...`.

Few rows and every path: clusters of 1 to 16 blocks with several rows for each, rows that start unaligned, edges longer
than the row, masked rows, statistics alone, deferred scales, shards. Answers are compared with the reference backend.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from gft_kernels import gft_loss, policy_loss
from gft_kernels.backends import cuda, reference
from gft_kernels.options import AgreedRows, Credit, Objective, RowCall

VOCABULARIES = (1, 7, 1003, 32000, 151936)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def loss_and_gradient(backend: str, logits: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.clone().requires_grad_()
    loss = policy_loss(leaf * 1, backend=backend, **options)
    loss = loss[0] if isinstance(loss, tuple) else loss
    (3.0 * loss).backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def agree(ours, truth, dtype: torch.dtype) -> None:
    """ours, truth: losses and gradient."""
    torch.testing.assert_close(ours[0], truth[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[1], truth[1], rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=1e-5)


def compare(vocab: int, dtype: torch.dtype, **options) -> None:
    torch.manual_seed(vocab)
    logits = torch.randn(4, 3, vocab, device="cuda").to(dtype)
    targets = torch.randint(vocab, (4, 3), device="cuda")
    targets[1, 1] = -100
    shared = {"targets": targets, "rewards": torch.tensor([1.0, 0.0, 0.5, 0.5], device="cuda"), "group_size": 2}
    agree(*(loss_and_gradient(backend, logits, **shared, **options) for backend in ("cuda", "reference")), dtype)


def shards(dtype: torch.dtype, entropy_coef: float) -> None:
    logits, targets = torch.randn(1, 3, 1003, device="cuda").to(dtype), torch.tensor([5, 900, 400], device="cuda")
    call = RowCall(logits[..., 3:500], Credit(targets), Objective(entropy_coef=entropy_coef))
    ones = torch.ones(3, device="cuda")
    state = cuda.shard_statistics(call, targets - 3, ones.bool())
    agreed = AgreedRows(-ones, state.top_R, state.mass_R.log(), ones, entropy_coef * ones, ones)
    cuda.shard_gradient(call, targets - 3, agreed)
    torch.cuda.synchronize()


def clusters(dtype: torch.dtype, blocks: int) -> None:
    """Two clusters of this size walk over 7 rows, so that every buffer of a block is used again."""
    logits = torch.randn(1, 7, 4099, device="cuda").to(dtype)
    credit = Credit(torch.arange(7, device="cuda"), advantages_R=torch.randn(7, device="cuda"))
    call = RowCall(logits, credit, want_gradient=True)
    ours, truth = cuda.run(call, cluster=blocks, clusters=2), reference.run(call)
    agree((ours.loss, ours.gradient_STV), (truth.loss, truth.gradient_STV), dtype)


def rounded(dtype: torch.dtype, vocab: int) -> None:
    """A half gradient over float32 logits, in the cluster or, of the longest rows, in two passes."""
    logits = torch.randn(1, 5, vocab, device="cuda")
    credit = Credit(torch.arange(5, device="cuda"), advantages_R=torch.randn(5, device="cuda"))
    call = RowCall(logits.clone(), credit, want_gradient=True, inplace=True, gradient_dtype=dtype)
    ours, truth = cuda.run(call), reference.run(replace(call, logits_STV=logits.clone()))
    torch.testing.assert_close(ours.gradient_STV, truth.gradient_STV, rtol=2e-2, atol=1e-6)


def main() -> None:
    for dtype in DTYPES[1:]:
        rounded(dtype, 4099)
        rounded(dtype, 1_000_003)
    for dtype in DTYPES:
        for blocks in (1, 2, 5, 7, 8, 16) if torch.cuda.get_device_capability()[0] >= 9 else (1,):
            clusters(dtype, blocks)
        for vocab in VOCABULARIES:
            compare(vocab, dtype, inplace=vocab % 2 == 0)
        compare(1003, dtype, reduction="sequence-mean", return_entropy=True, softcap=30.0)
        log_probs = torch.full((4, 3), -7.0, device="cuda")
        penalties = {"ref_log_probs": log_probs, "beta": 0.1, "entropy_coef": 0.1}
        compare(1003, dtype, objective="grpo", old_log_probs=log_probs, **penalties)
        shards(dtype, entropy_coef=0.0)
        shards(dtype, entropy_coef=0.1)
    compare(262144, torch.float32)
    with torch.no_grad():
        logits = torch.randn(5, 50257, device="cuda")
        gft_loss(logits, torch.arange(5, device="cuda"), return_stats=True, backend="cuda")
    torch.cuda.synchronize()
    print("every call agrees with the reference")


if __name__ == "__main__":
    main()
