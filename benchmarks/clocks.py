"""Clocks: how one step is timed on a CPU and on a GPU, with cold or warm caches."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

from benchmarks.provenance import last_level_cache_bytes

Step = Callable[[], object]


class Clock(Protocol):
    def arm(self, step: Step) -> Step:  # once per contender, before timing
        return step

    def time(self, step: Step) -> float: ...  # seconds of one step


def _alone() -> None:
    """Nobody to wait for."""


class CpuClock(Clock):
    """Wall time. cold: a buffer of twice the last-level cache is swept before each step."""

    def __init__(self, *, cold: bool, meet: Step = _alone):
        self._meet = meet
        self.name = f"perf_counter, {'cold' if cold else 'warm'} cache"
        self._sweep = torch.zeros(2 * last_level_cache_bytes() // 4 if cold else 0)

    def time(self, step: Step) -> float:
        self._sweep.add_(1.0)
        self._meet()
        start = time.perf_counter()
        result = step()
        elapsed = time.perf_counter() - start
        del result  # freed after the clock stops, for every contender alike
        return elapsed


class CudaClock(Clock):
    """Device time between two events on the current stream. cold: the L2 cache is overwritten before each step."""

    def __init__(self, *, cold: bool, meet: Step = _alone):
        self._meet = meet
        self.name = f"CUDA events, {'cold' if cold else 'warm'} L2"
        cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20)
        self._sweep = torch.zeros(4 * cache if cold else 0, dtype=torch.uint8, device="cuda")

    def time(self, step: Step) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._sweep.zero_()
        self._meet()
        start.record()
        result = step()
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end) * 1e-3


class CudaGraphClock(CudaClock):
    """As CudaClock, with each step captured once and replayed: what is left is the device's own work.

    For shapes so small that launching from Python takes longer than the kernels. A contender that synchronises with
    the host cannot be captured; the harness then reports its failure.
    """

    def __init__(self, *, cold: bool):
        super().__init__(cold=cold)
        self.name = f"CUDA graph replay, {self.name}"

    def arm(self, step: Step) -> Step:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # capture forbids first-call work: compilation, workspaces, handles
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay


def clock_for(device: str, *, cold: bool = True, graph: bool = False, meet: Step = _alone) -> Clock:
    """meet: called when caches are swept and the step is about to start; ranks wait for each other in it."""
    if device == "cpu":
        return CpuClock(cold=cold, meet=meet)
    return CudaGraphClock(cold=cold) if graph else CudaClock(cold=cold, meet=meet)
