"""Two ranks over gloo: the same gradient on both, and the one a single process would have taken."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import torch
import torch.multiprocessing as mp
import trainer_rig as rig
from test_trainer import Gradients

from gft_kernels.trainer import SaveOnInterrupt


def run_rank(rank, world, port, path, queue):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    taken, logged = gradients(path, micro_batch=2, ddp_backend="gloo")
    queue.put((rank, taken, logged, stopping_step(path, interrupted=rank == 0)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def gradients(path, micro_batch, **options):
    """Steps over 12 ragged groups, the last of them partial; returns gradients and logged losses."""
    seen = Gradients()
    trainer = rig.trainer(
        Path(path), rig.gpt2(dropout=0.0), rig.offline_rows(12), reward_funcs=(), callbacks=[seen], num_generations=0,
        per_device_train_batch_size=micro_batch, gradient_accumulation_steps=2, max_steps=-1, num_train_epochs=1,
        max_grad_norm=0.0, optim="sgd", **options,
    )  # fmt: skip
    trainer.train()
    logged = [(line["loss"], line["reward/offline"]) for line in trainer.state.log_history if "loss" in line]
    return [g.numpy() for g in seen.steps], logged


def stopping_step(path, interrupted):
    """Where a run ends if only one rank has seen Ctrl-C."""
    stop = SaveOnInterrupt()
    stop.interrupted = interrupted
    trainer = rig.trainer(
        Path(path), train=rig.offline_rows(8), reward_funcs=(), callbacks=[stop], num_generations=0, max_steps=4,
        ddp_backend="gloo",
    )  # fmt: skip
    trainer.train()
    return trainer.state.global_step, (Path(path) / "checkpoint-1").is_dir()


def test_two_ranks_take_the_step_of_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    ranks = [context.Process(target=run_rank, args=(r, 2, port, str(tmp_path / str(r)), queue)) for r in range(2)]
    for process in ranks:
        process.start()
    results = {r: rest for r, *rest in (queue.get(timeout=120) for _ in ranks)}
    for process in ranks:
        process.join(timeout=60)
        assert process.exitcode == 0
    (first, first_logged, *first_stop), (second, second_logged, *second_stop) = results[0], results[1]
    alone, alone_logged = gradients(tmp_path / "alone", micro_batch=4)
    assert len(first) == len(second) == len(alone) == 2  # 8 groups, then the last 4
    for a, b, one in zip(first, second, alone, strict=True):
        a, b, one = map(torch.from_numpy, (a, b, one))
        assert torch.equal(a, b)
        assert one.norm() > 1e-3
        assert (a - one).norm() <= 1e-6 * one.norm()
    assert first_logged == second_logged
    assert first_stop == [(1, True)] and second_stop[0][0] == 1
    for ours, theirs in zip(first_logged, alone_logged, strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-6)
