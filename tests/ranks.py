"""Processes that form a group, forked from the tests' own, where everything they need is imported."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import torch

START = "forkserver" if torch.cuda.is_available() else "fork"
"""With a GPU autograd has threads, which no fork takes along: each rank then imports for itself."""


def start_ranks(work, folder: Path, count: int) -> list:
    """What `work(rank, folder)` gives in each of `count` processes that torchrun might have started.

    Raises what the first to fail raised.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.start_processes(_started, (work, folder, port, count), count, start_method=START)
    return results_in(folder, count)


def results_in(folder: Path, count: int) -> list:
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def _started(rank: int, work, folder: Path, port: int, count: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if "accelerate" in sys.modules:  # a test before may have told it that it is alone
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    bring_back(work, rank, folder)


def bring_back(work, rank: int, folder: Path) -> None:
    """What a rank does: its work, on one thread, whose result goes into the folder."""
    torch.set_num_threads(1)
    torch.save(work(rank, folder), folder / f"{rank}.pt")
    if torch.distributed.is_initialized():  # by the work, which may end it too
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
