"""New memory of the logits' size is asked for in large pages, by Linux's own account of it; nothing else is."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch
from cases import UPSTREAM
from torch._subclasses import FakeTensorMode

from gft_kernels import gft_linear_loss, gft_loss, large_pages
from gft_kernels.linear.chunks import row_buffer

SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")
V, D = 1_000_003, 3  # a float32 row of logits, and this head, pass large_pages.LEAST


def is_asked_for(tensor: torch.Tensor) -> bool:
    """Whether the mapping around the middle of a tensor has the flag of madvise(MADV_HUGEPAGE)."""
    middle, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first:
            start, end = (int(address, 16) for address in first.split("-"))
            inside = start <= middle < end
        elif inside and first == "VmFlags:":
            return "hg" in rest
    raise AssertionError("no mapping holds the tensor")


@pytest.mark.skipif(not SYSTEM.exists(), reason="needs Linux with large pages")
def test_what_a_call_makes_is_asked_for():
    logits, targets = torch.randn(2, V, requires_grad=True), torch.tensor([3, 5])
    (gft_loss(logits, targets) * UPSTREAM).backward()
    hidden, weight = torch.randn(2, D), torch.randn(V, D, requires_grad=True)
    gft_linear_loss(hidden, weight, targets).backward()
    made = {"logits": logits.grad, "weight": weight.grad, "chunk": row_buffer(2, V, torch.float32, logits.device)}
    assert [name for name, tensor in made.items() if not is_asked_for(tensor)] == []


def test_nothing_is_asked_for_small_or_traced_tensors(monkeypatch):
    asked = []
    monkeypatch.setattr(large_pages, "ADVICE", 14)
    monkeypatch.setattr(large_pages, "_madvise", lambda: lambda *given: asked.append(given))
    with FakeTensorMode():
        traced = torch.empty(V, D)
    for new in (torch.empty(1000), torch.empty(V, D, device="meta"), traced):
        assert large_pages.in_large_pages(new) is new
    assert asked == []
    new = torch.empty(V, D)
    large_pages.in_large_pages(new)
    [(start, length, advice)] = asked
    assert advice == 14 and start % mmap.PAGESIZE == 0 and start + length == new.data_ptr() + new.nbytes
    assert 0 <= start - new.data_ptr() < mmap.PAGESIZE
