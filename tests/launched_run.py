"""What one rank does when test_trainer_launch.py starts two: small runs of the trainer, their weights into a folder.

Started by start_ranks for DDP; by accelerate launch, as `launched_run.py fsdp|deepspeed FOLDER`, for what it sets up.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
import warnings
from pathlib import Path

import trainer_rig as rig
from ranks import bring_back

from gft_kernels.trainer import SaveOnInterrupt

OFFLINE = {"reward_funcs": (), "num_generations": 0}
DRIFTING = {"objective": "grpo", "beta": 0.5, "steps_per_rollout": 2, "num_train_epochs": 2, "num_iterations": 2,
            "normalize": "batch", "top_entropy_quantile": 0.6}  # fmt: skip
FOLLOWING = {"objective": "grpo", "beta": 0.5, "sync_ref_model": True, "ref_model_sync_steps": 1}


def brief_llama():
    """Many tokens end a response, so its responses are of different lengths."""
    model = rig.untied_llama()
    model.generation_config.eos_token_id = list(range(1, 8))
    return model


MODELS = {
    "llama": rig.untied_llama,
    "brief": brief_llama,
    "gpt2": lambda: rig.gpt2(dropout=0.0),  # its head is tied to its embedding
}


def equal_rewards_on_the_second_rank() -> list[dict]:
    """Four groups; the last two, which fall to the second of two ranks, have no advantage."""
    rows = rig.offline_rows(4)
    return [row | {"rewards": [0.5] * len(row["rewards"])} if i >= 2 else row for i, row in enumerate(rows)]


RUNS = {
    # name: (model, rows, options)
    "ragged": ("llama", rig.offline_rows(11), OFFLINE),  # a full step of 8 groups, one of 3
    "tied": ("gpt2", rig.offline_rows(11), OFFLINE),
    "a rank without a live token": ("llama", equal_rewards_on_the_second_rank(), OFFLINE),
    "a rank without a row": ("llama", rig.offline_rows(1), OFFLINE),
    "grpo, two steps a rollout, twice": ("llama", rig.offline_rows(11), OFFLINE | DRIFTING),
    "sampled": ("brief", rig.rows(7), {"generation_batch_size": 1, "num_generations": 3}),
    "head in its own group": ("llama", rig.offline_rows(11), OFFLINE | FOLLOWING),
}

SHARDED_ONLY = ("head in its own group",)


def run(name: str, path: Path, micro_batch: int, kind: str = "alone") -> dict:
    """Gradients, final weights and logged losses of one run."""
    model, rows, options = RUNS[name]
    seen = rig.Gradients()
    if kind == "fsdp":
        shard_on_a_cpu(head_alone=name == "head in its own group")
    trainer = rig.trainer(
        path, MODELS[model](), rows, callbacks=[seen], per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=2, max_steps=-1, max_grad_norm=0.0, optim="sgd", learning_rate=0.1,
        ddp_backend=None if kind == "alone" else "gloo", **{"num_train_epochs": 1, **options},
    )  # fmt: skip
    lines = rig.trained(trainer)
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # FSDP2, ZeRO-3: gathered on rank 0
    if name == "ragged":
        trainer.save_model(str(path.parent / "saved"))
    names = ("loss", "zero_std_groups", "completion_length", "drift/mean_abs_log_ratio", "drift/max_abs_log_ratio")
    logged = [tuple(line.get(name, 0.0) for name in names) for line in lines]
    return {"gradients": seen.steps, "weights": weights, "logged": logged}


def shard_on_a_cpu(head_alone: bool) -> None:
    """accelerate shards on accelerators only: these gloo ranks take the name of GPU ranks, and it shards here too."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    layers = "LlamaDecoderLayer,Linear" if head_alone else ""  # without a name: the layers the model names
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = layers
    if not layers:
        del os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"]


def stopping_step(path: Path, interrupted: bool) -> tuple[int, bool]:
    """Where a run ends if only one rank has seen Ctrl-C, and whether it saved."""
    stop = SaveOnInterrupt()
    stop.interrupted = interrupted
    trainer = rig.trainer(
        path, train=rig.offline_rows(8), reward_funcs=(), callbacks=[stop], num_generations=0, max_steps=4,
        ddp_backend="gloo",
    )  # fmt: skip
    trainer.train()
    return trainer.state.global_step, (path / "checkpoint-1").is_dir()


def losses_straight_and_resumed(path: Path) -> list[list[float]]:
    """Of the steps behind the third; two make an epoch, in a random order, of which every rank reads its rows."""
    options = OFFLINE | FOLLOWING | {"save_strategy": "steps", "save_steps": 3, "train_sampling_strategy": "random"}
    options |= {"max_steps": 6, "per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    found = []
    for how in ({}, {"resume_from_checkpoint": str(path / "checkpoint-3")}):
        trainer = rig.trainer(path, rig.untied_llama(), rig.offline_rows(7), **options)
        found.append([line["loss"] for line in rig.trained(trainer, **how)][-3:])
    return found


def work(rank: int, folder: Path, kind: str) -> dict:
    warnings.filterwarnings("error", message="the GFT loss")
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    names = [name for name in RUNS if kind == "fsdp" or name not in SHARDED_ONLY]
    results: dict = {name: run(name, folder / str(rank), micro_batch=2, kind=kind) for name in names}
    if kind == "ddp":
        results["stop"] = stopping_step(folder / str(rank), interrupted=rank == 0)
        results["resumed"] = losses_straight_and_resumed(folder / "resumed")
    return results


if __name__ == "__main__":
    gc.freeze()  # as tests/conftest.py does
    bring_back(functools.partial(work, kind=sys.argv[1]), int(os.environ["RANK"]), Path(sys.argv[2]))
