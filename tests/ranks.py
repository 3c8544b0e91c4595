"""Processes that form a group, forked from one that has imported what they need, which takes each of them seconds."""

from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path

import torch

IMPORTED = ["torch._dynamo", "gft_kernels.trainer", "trl_rig"]  # the last one stands in tests/integrations


def start_ranks(work, folder: Path, count: int) -> list:
    """What `work(rank, folder)` gives in each of `count` processes that torchrun might have started.

    Raises what the first to fail raised.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.set_forkserver_preload(IMPORTED)
    torch.multiprocessing.start_processes(_rank, (work, folder, port, count), count, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def _rank(rank: int, work, folder: Path, port: int, count: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.save(work(rank, folder), folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
