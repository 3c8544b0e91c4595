"""`python -m gft_kernels`: versions, each backend (ready, or the reason not), a parity check against the reference.

Exit code 1 where a backend differs, or one that `--require` names is absent.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from importlib import metadata

import torch

from gft_kernels import __version__, _extension, backends, gft_loss
from gft_kernels.backends import cuda
from gft_kernels.options import Credit, RowCall

PARITY_TOLERANCE = 1e-5
"""Largest relative difference of loss or gradient from the reference, in float32."""


def versions() -> dict[str, str]:
    """Versions of this library and of what it works with, by package name."""
    found = {"gft_kernels": __version__, "python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "trl"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def parity(name: str) -> float:
    """Largest relative difference of a backend's loss and gradient from the reference's on a small ragged problem."""
    device = "cuda" if name in ("cuda", "triton") else "cpu"
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(8, 4, 5003, generator=generator)
    targets = torch.randint(5003, (8, 4), generator=generator)
    rewards = torch.rand(8, generator=generator)
    results = []
    for backend in ("reference", name):
        leaf = logits.to(device).requires_grad_(True)
        loss = gft_loss(leaf, targets.to(device), rewards=rewards.to(device), group_size=4, tau=0.3, backend=backend)
        assert isinstance(loss, torch.Tensor)
        (gradient,) = torch.autograd.grad(2.5 * loss, leaf)
        results.append((loss.detach(), gradient))
    (loss, gradient), (other_loss, other_gradient) = results
    return max(
        float((other_loss - loss).abs() / loss.abs()),
        float((other_gradient - gradient).abs().max() / gradient.abs().max()),
    )


def cuda_lines(ready: bool) -> list[str]:
    """CUDA's versions, of a build that has it, and how a batch of 8192 rows of a large vocabulary is launched."""
    if not _extension.has_cuda():
        return []
    found = {name: f"{number // 1000}.{number % 1000 // 10}" for name, number in cuda.versions().items() if number}
    driver = f"the driver serves {found['driver']}" if "driver" in found else "there is no driver"
    lines = [f"{'':<10} CUDA {found['runtime']} linked in, {driver}"]
    if not ready:
        return lines
    one_row = torch.empty(1, 1, 151936, dtype=torch.bfloat16, device="cuda")
    logits = one_row.expand(1, 8192, -1)  # a plan reads its shape alone
    plan = cuda.plan(RowCall(logits, Credit(torch.zeros(8192, dtype=torch.int64)), want_gradient=True))
    refused = f"; refused before: {plan['refused']}" if plan["refused"] else ""
    return [*lines, f"{'':<10} 8192 rows of 151936 in bfloat16: {plan['kernel']}, {plan['cluster']} blocks a row of "
                    f"{plan['threads']} threads and {plan['shared_bytes']} bytes, {plan['resident']} rows at once"
                    f"{refused}"]  # fmt: skip


def report() -> tuple[list[str], bool]:
    """The lines of the report, and whether every ready backend agrees with the reference."""
    lines = ["  ".join(f"{name} {version}" for name, version in versions().items()), ""]
    agrees = True
    for name in backends.ORDER:
        reason = backends.named(name).absent()
        if reason is not None:
            lines.append(f"{name:<10} absent: {reason}")
            lines += cuda_lines(ready=False) if name == "cuda" else []
            continue
        difference = parity(name)
        right = difference <= PARITY_TOLERANCE
        agrees = agrees and right
        verdict = "agrees with the reference" if right else "DIFFERS from the reference"
        lines.append(f"{name:<10} ready, {verdict} (largest relative difference {difference:.1e})")
        lines += cuda_lines(ready=True) if name == "cuda" else []
    return lines, agrees


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gft_kernels", description="What this machine can run.")
    parser.add_argument("--require", nargs="+", default=[], choices=backends.ORDER, help="backends that must be ready")
    required = parser.parse_args(arguments).require
    lines, agrees = report()
    print("\n".join(lines))
    return 0 if agrees and all(backends.named(name).absent() is None for name in required) else 1


if __name__ == "__main__":
    sys.exit(main())
