"""Processes that form a group."""

from __future__ import annotations

import faulthandler
import os
import socket
from pathlib import Path

import torch
from processes import CONTEXT

PATIENCE = 300
"""Seconds until ranks that still run say where they are, and end."""


def start_ranks(work, folder: Path, count: int) -> list:
    """What `work(rank, folder)` gives in each of `count` processes that torchrun might have started.

    Raises what the first to fail raised.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    method = CONTEXT.get_start_method()
    torch.multiprocessing.start_processes(_started, (work, folder, port, count), count, start_method=method)
    return results_in(folder, count)


def results_in(folder: Path, count: int) -> list:
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def _started(rank: int, work, folder: Path, port: int, count: int) -> None:
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    bring_back(work, rank, folder)


def bring_back(work, rank: int, folder: Path) -> None:
    """What a rank does: its work, on one thread, whose result goes into the folder."""
    torch.set_num_threads(1)
    torch.save(work(rank, folder), folder / f"{rank}.pt")
    if torch.distributed.is_initialized():  # by the work, which may end it too
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
