"""StepMean in the installed Lightning: a step is the formula's however it is cut, in one process and in two."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning.pytorch", reason="Lightning is not installed here: pip install lightning==2.6.0")

import host_rig
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq

from gft_kernels.integrations.lightning import StepMean
from gft_kernels.integrations.response_rows import CarryAdvantages, patch_for_rows

ROOT = Path(__file__).parents[2]


class Policy(LightningModule):
    def __init__(self, folder, seen):
        super().__init__()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model, self.seen = patch_for_rows(model, counted=False, tau=host_rig.TAU, reduction="sum"), seen

    def training_step(self, batch, index):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def configure_gradient_clipping(self, *args, **kwargs):
        """Lightning calls this after every on_before_optimizer_step: what is clipped must be the mean already."""
        self.seen.steps.append({name: p.grad.clone() for name, p in self.model.named_parameters()})


def fit(module, micro_batch, accumulation, epochs=1):
    collate = CarryAdvantages(DataCollatorForSeq2Seq(host_rig.tokenizer()))
    rows = DataLoader(
        host_rig.encoded_rows(), micro_batch, collate_fn=lambda part: dict(collate([dict(r) for r in part]))
    )
    trainer = Trainer(
        accelerator="cpu", max_epochs=epochs, accumulate_grad_batches=accumulation, callbacks=[StepMean()],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, rows)


@pytest.mark.parametrize(("micro_batch", "accumulation"), [(8, 1), (2, 4), (1, 8)])
def test_a_step_is_the_formulas_however_it_is_cut(tmp_path, micro_batch, accumulation):
    """11 rows: the last step is a partial window, by whose whole length Lightning divides."""
    host_rig.write_model(tmp_path)
    seen = host_rig.Gradients()
    fit(Policy(tmp_path, seen), micro_batch, accumulation)
    host_rig.assert_steps(seen, host_rig.expected_steps(tmp_path, host_rig.encoded_rows()))


def test_a_window_that_was_left_is_not_counted(tmp_path):
    """The first epoch ends in the middle of a window, and Lightning drops its gradients."""
    host_rig.write_model(tmp_path)
    seen = host_rig.Gradients()
    module = Policy(tmp_path, seen)
    module.on_train_batch_start = lambda batch, index: -1 if module.current_epoch == 0 and index == 1 else None
    fit(module, 2, 4, epochs=2)
    host_rig.assert_steps(seen, host_rig.expected_steps(tmp_path, host_rig.encoded_rows()))


def test_a_loss_that_is_a_mean_already_is_an_error(tmp_path):
    host_rig.write_model(tmp_path)
    module = Policy(tmp_path, host_rig.Gradients())
    patch_for_rows(module.model, counted=False, tau=host_rig.TAU)
    with pytest.raises(ValueError, match="reduction must be 'sum' with StepMean, got 'token-mean'"):
        fit(module, 8, 1)


def test_gradients_it_would_not_find_are_an_error(tmp_path):
    host_rig.write_model(tmp_path)
    module = Policy(tmp_path, host_rig.Gradients())
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="automatic_optimization must be True with StepMean"):
        fit(module, 8, 1)


def test_processes_do_not_change_a_step(tmp_path):
    """The example: 16 rows a step in one process, and as 2 x 4 x 2 in two."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / "integrations" / "lightning_digit_sums.py"), "--steps", "9"]
    lines = []
    for cut in ([], ["--micro-batch", "2", "--accumulate", "4", "--devices", "2"]):
        done = subprocess.run(
            [*command, *cut], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        lines.append([float(x) for x in re.findall(r"gradient norm (\S+)", done.stdout)])
    assert len(lines[0]) == 2 and lines[0] == pytest.approx(lines[1], abs=3e-5)
