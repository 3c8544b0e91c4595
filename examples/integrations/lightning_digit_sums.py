"""GFT in Lightning, on digit sums: python examples/integrations/lightning_digit_sums.py

Every step prints the same line, whatever the micro-batches, the accumulation and the number of processes:

    python examples/integrations/lightning_digit_sums.py --micro-batch 2 --accumulate 4 --devices 2
"""

from __future__ import annotations

import argparse
import functools
import random
from pathlib import Path

import digit_sums
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM, AutoTokenizer

from gft_kernels.integrations.lightning import StepMean
from gft_kernels.integrations.response_rows import encode_row, patch_for_rows

FOLDER = Path("runs/lightning")


class Policy(LightningModule):
    def __init__(self, folder: Path, micro_batch: int):
        super().__init__()
        self.micro_batch, self.tokenizer = micro_batch, AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = patch_for_rows(model, counted=False, tau=0.1, reduction="sum")  # StepMean divides

    def train_dataloader(self):
        encoded = [encode_row(row, self.tokenizer) for row in digit_sums.rows()]
        random.Random(0).shuffle(encoded)
        # In one order for any number of processes; the sampler that Lightning would add shuffles them differently.
        sampler = DistributedSampler(encoded, self.trainer.world_size, self.trainer.global_rank, shuffle=False)
        collate = functools.partial(digit_sums.batch, pad_id=self.tokenizer.pad_token_id)
        return DataLoader(encoded, self.micro_batch, sampler=sampler, collate_fn=collate)

    def training_step(self, batch, index):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)
        if self.trainer.is_global_zero and self.trainer.global_step % 8 == 0:
            print(f"step {self.trainer.global_step:3}  gradient norm {norm:.5f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--steps", type=int, default=-1, help="-1: all rows once")
    options = parser.parse_args()

    seed_everything(0, verbose=False)
    base = FOLDER / "base"
    if not (base / "config.json").exists():
        base.mkdir(parents=True)
        digit_sums.write_base_model(base)
    policy = Policy(base, options.micro_batch)
    before = digit_sums.margin(policy.model, policy.tokenizer)
    policy.train()
    trainer = Trainer(
        accelerator="cpu",
        devices=options.devices,
        strategy="ddp" if options.devices > 1 else "auto",
        accumulate_grad_batches=options.accumulate,
        max_epochs=1,
        max_steps=options.steps,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        callbacks=[StepMean()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(policy)
    if trainer.is_global_zero:
        digit_sums.report(before, digit_sums.margin(policy.model, policy.tokenizer))


if __name__ == "__main__":
    main()
