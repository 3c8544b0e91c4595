"""TRL's trainers on two ranks (gloo), under DDP and FSDP2: the steps of one process with the joined batch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import trainer_rig as rig
from datasets import Dataset
from launched_run import shard_on_a_cpu
from ranks import start_ranks

pytest.importorskip("trl", reason="trl is not installed: pip install 'gft-kernels[trl]'")

import trl_rig

from gft_kernels.integrations.trl import GFTGRPOTrainer

WORLD = 2
ROWS = {"grpo": rig.rows(8), "sft": trl_rig.sft_rows(8), "fsdp2": rig.rows(8)}
ROWS["sft"][1]["completion"] = "1+2=3." * 3  # so that ranks do not hold the same number of tokens
GIVEN = {"num_generations": 2, "num_demonstrations": 2}  # nothing sampled: each rank has random numbers of its own
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}  # fmt: skip


def steps(folder: Path, kind: str, processes: int) -> list[torch.Tensor]:
    """Gradients of two steps."""
    seen = rig.Gradients()
    options = {"per_device_train_batch_size": 8 // processes, **({"ddp_backend": "gloo"} if processes > 1 else {})}
    if kind == "sft":
        trl_rig.sft_trainer(folder, tau=0.05, rows=ROWS[kind], callbacks=[seen], **options).train()
        return seen.steps
    args, model = trl_rig.config(folder, **GIVEN, **options), rig.untied_llama()
    if kind == "fsdp2" and processes > 1:
        shard_on_a_cpu(head_alone=False)
    brought = {"processing_class": rig.tokenizer(), "callbacks": [seen]}
    trainer = GFTGRPOTrainer(model, length, args, train_dataset=Dataset.from_list(ROWS[kind]), **brought)
    trainer.train()
    assert (trainer.model_wrapped is not trainer.model) == (kind == "grpo" and processes > 1)
    assert hasattr(trainer.model, "reshard") == (kind == "fsdp2" and processes > 1)
    return seen.steps


def length(prompts, completions, **columns):
    """Rewards that differ within each group, and by different amounts."""
    return [float(len(text)) for text in completions]


def run_rank(rank: int, folder: Path) -> dict[str, list[torch.Tensor]]:
    taken = {}
    for kind in ROWS:
        os.environ.update(FSDP2 if kind == "fsdp2" else {})
        taken[kind] = steps(folder / str(rank), kind, WORLD)
    return taken


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, list[torch.Tensor]]]:
    return start_ranks(run_rank, tmp_path_factory.mktemp("ranks"), WORLD)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ROWS)
def test_two_ranks_take_the_steps_of_one(ranks, kind, tmp_path):
    alone = steps(tmp_path, kind, 1)
    assert len(alone) == len(ranks[0][kind]) == 2
    for first, second, one in zip(ranks[0][kind], ranks[1][kind], alone, strict=True):
        assert torch.equal(first, second)
        assert one.norm() > 1e-2
        assert (first - one).norm() <= 1e-5 * one.norm()
