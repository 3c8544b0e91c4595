"""Processes that form a group, forked from one that has imported what they need, which takes each of them seconds."""

from __future__ import annotations

import multiprocessing

import torch.multiprocessing

IMPORTED = ["torch._dynamo", "gft_kernels.trainer", "trl_rig"]  # the last one stands in tests/integrations


def start_ranks(work, arguments: tuple, count: int) -> None:
    """Runs `work(rank, *arguments)` in `count` processes and waits for them; raises what the first to fail raised."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    torch.multiprocessing.start_processes(work, args=arguments, nprocs=count, start_method="forkserver")
