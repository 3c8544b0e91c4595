"""TRL's trainers with the GFT loss on two ranks (gloo): the steps of one process with the joined batch."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import trainer_rig as rig
from test_trainer import Gradients

pytest.importorskip("trl", reason="trl is not installed: pip install 'gft-kernels[trl]'")

import trl_rig

WORLD = 2
ROWS = {"grpo": rig.rows(8), "sft": trl_rig.sft_rows(8)}
ROWS["sft"][1]["completion"] = "1+2=3." * 3  # so that ranks do not hold the same number of tokens


def steps(folder: Path, kind: str, processes: int) -> list[torch.Tensor]:
    """Gradients of two steps. Every response is given, for ranks sample with random numbers of their own."""
    seen = Gradients()
    options = {"callbacks": [seen], "rows": ROWS[kind], "per_device_train_batch_size": 8 // processes}
    options |= {"ddp_backend": "gloo"} if processes > 1 else {}
    if kind == "sft":
        trl_rig.sft_trainer(folder, tau=0.05, **options).train()
    else:
        trl_rig.trainer(folder, num_generations=2, num_demonstrations=2, reward_funcs=length, **options).train()
    return seen.steps


def length(prompts, completions, **columns):
    """Rewards that differ within each group, and by different amounts."""
    return [float(len(text)) for text in completions]


def run_rank(rank: int, port: int, folder: str) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    taken = {kind: steps(Path(folder, str(rank)), kind, WORLD) for kind in ROWS}
    torch.save(taken, Path(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, list[torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(run_rank, args=(port, str(folder)), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("kind", ROWS)
def test_two_ranks_take_the_steps_of_one(ranks, kind, tmp_path):
    alone = steps(tmp_path, kind, 1)
    assert len(alone) == len(ranks[0][kind]) == 2
    for first, second, one in zip(ranks[0][kind], ranks[1][kind], alone, strict=True):
        assert torch.equal(first, second)
        assert one.norm() > 1e-2
        assert (first - one).norm() <= 1e-5 * one.norm()
