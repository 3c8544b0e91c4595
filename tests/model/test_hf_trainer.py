"""A patched model in transformers.Trainer as it comes: the columns arrive, and a step's scale is right."""

from __future__ import annotations

import pytest
import torch
import trainer_rig as rig
from test_hf import assert_same, gradients
from tiny_families import VOCABULARY, tiny
from transformers import Trainer, TrainingArguments

from gft_kernels import gft_loss
from gft_kernels.model.patch import patch_model

WINDOW, ROWS = 8, 11  # the second window is a partial one of 3


def rows() -> list[dict]:
    """As many live tokens in each row as fall to it, so a mean of means differs from the mean of the window."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for s in range(ROWS):
        input_ids = torch.randint(3, VOCABULARY, (9,), generator=generator)
        labels = torch.where(torch.arange(9) < 1 + (5 * s) % 7, -100, input_ids)
        made.append({"input_ids": input_ids, "labels": labels, "gft_advantages": 1.5 - 0.4 * s, "unknown": 3})
    return made


CUTS = [(8, 1), (4, 2), (2, 4), (1, 8)]


def windows(model, made: list[dict], beside=lambda ids: 0.0) -> list[tuple[float, dict]]:
    """Loss and gradients of each window from the logits, with the window's token count; `beside(ids)` is added."""
    found = []
    for start in range(0, ROWS, WINDOW):
        part = made[start : start + WINDOW]
        ids, labels = (torch.stack([row[name] for row in part]) for name in ("input_ids", "labels"))
        advantages = torch.tensor([row["gft_advantages"] for row in part])
        loss = gft_loss(model(input_ids=ids).logits[:, :-1], labels[:, 1:], advantages=advantages) + beside(ids)
        loss.backward()
        found.append((loss.item(), gradients(model)))
    return found


def trained(model, made: list[dict], tmp_path, micro_batch: int, accumulation: int) -> list[tuple[float, dict]]:
    """Logged loss and gradients of each step of a trainer with the patched model."""
    seen = rig.Gradients()
    args = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=micro_batch, gradient_accumulation_steps=accumulation,
        learning_rate=0.0, max_grad_norm=0.0, num_train_epochs=1, train_sampling_strategy="sequential",
        logging_steps=1, save_strategy="no", disable_tqdm=True, report_to="none", use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(patch_model(model), args, train_dataset=made, callbacks=[seen])
    losses = [line["loss"] for line in rig.trained(trainer)]
    return list(zip(losses, seen.named, strict=True))


@pytest.mark.parametrize(("micro_batch", "accumulation"), CUTS)
def test_a_step_does_not_depend_on_how_it_is_cut(tmp_path, micro_batch, accumulation):
    expected = windows(tiny("gemma2"), rows())
    found = trained(tiny("gemma2"), rows(), tmp_path, micro_batch, accumulation)
    assert len(found) == len(expected) == 2
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs, tolerance=1e-4)  # the loss is logged in few digits
