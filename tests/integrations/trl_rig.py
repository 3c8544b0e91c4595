"""TRL trainers small enough for a test, on the rows and models of trainer_rig.py."""

from __future__ import annotations

import trainer_rig as rig
from datasets import Dataset

from gft_kernels.integrations.trl import GFTGRPOConfig, GFTGRPOTrainer, GFTSFTConfig, GFTSFTTrainer

QUIET = {
    "per_device_train_batch_size": 8, "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "max_steps": 2,
    "learning_rate": 1e-2, "max_grad_norm": 0.0, "optim": "sgd", "logging_steps": 1, "report_to": "none",
    "save_strategy": "no", "disable_tqdm": True, "seed": 3,
}  # fmt: skip


def config(tmp_path, **options) -> GFTGRPOConfig:
    """Groups of four, two of them given."""
    group = {"num_generations": 4, "num_demonstrations": 2, "max_completion_length": 10, "shuffle_dataset": False}
    return GFTGRPOConfig(str(tmp_path), **{**QUIET, **group, **options})


def trainer(tmp_path, model=None, rows=None, reward_funcs=rig.digit_count, evaluation=None, callbacks=None, **options):
    data = {"train_dataset": Dataset.from_list(rig.rows() if rows is None else rows), "eval_dataset": evaluation}
    model = rig.llama() if model is None else model
    brought = {"processing_class": rig.tokenizer(), "callbacks": callbacks}
    return GFTGRPOTrainer(model, reward_funcs, config(tmp_path, **options), **data, **brought)


def assert_same_gradients(ours, theirs, rtol: float, floor: float) -> None:
    """Of two models, parameter by parameter; one below the floor is compared to that."""
    for (name, mine), its in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (mine.grad - its.grad).norm() <= rtol * max(its.grad.norm(), floor), name


def sft_rows(count=8) -> list[dict]:
    return [{"prompt": row["prompt"], "completion": row["demonstrations"][0]} for row in rig.rows(count)]


def sft_trainer(tmp_path, model=None, rows=None, callbacks=None, **options) -> GFTSFTTrainer:
    args = GFTSFTConfig(str(tmp_path), **{**QUIET, "shuffle_dataset": False, **options})
    data = Dataset.from_list(sft_rows() if rows is None else rows)
    model = rig.llama() if model is None else model
    return GFTSFTTrainer(model, args, train_dataset=data, processing_class=rig.tokenizer(), callbacks=callbacks)


def generated(trainer, rows: int) -> tuple[list[dict], dict]:
    """A batch of `rows` whole groups as TRL's sampler repeats them, and what the trainer makes of it."""
    size = trainer.num_generations
    repeated = [dict(trainer.train_dataset[i // size]) for i in range(rows * size)]
    trainer.model.train()
    return repeated, trainer._generate_and_score_completions(repeated)


def completions(output: dict) -> list[list[int]]:
    pairs = zip(output["completion_ids"], output["completion_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in pairs]
