"""One call of each case, for a profiler to look at: `ncu ... python -m benchmarks.gpu.one_call`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gft_kernels import gft_loss


@dataclass(frozen=True)
class Case:
    backend: str
    rows: int
    vocab: int
    dtype: str


CASES = (
    Case("cuda", 4096, 151936, "bfloat16"),
    Case("cuda", 2048, 151936, "float32"),
    Case("cuda", 4096, 50257, "bfloat16"),  # odd: rows start anywhere
    Case("cuda", 1024, 262144, "float32"),  # 16 blocks a cluster
    Case("triton", 4096, 151936, "bfloat16"),
)


def call(case: Case) -> None:
    """Forward in place: the one launch that reads logits and writes their gradient."""
    device, dtype = torch.device("cuda"), getattr(torch, case.dtype)
    logits = torch.randn(case.rows, case.vocab, device=device, dtype=dtype).requires_grad_()
    targets = torch.randint(case.vocab, (case.rows,), device=device)
    gft_loss(logits * 1, targets, tau=0.7, inplace=True, backend=case.backend)
    torch.cuda.synchronize()


if __name__ == "__main__":
    for one in CASES:
        call(one)
