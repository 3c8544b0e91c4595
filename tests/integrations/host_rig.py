"""A tiny model, scored rows and the gradients of each optimizer step: what every trainer that is a host must reproduce.

The expected gradients are a float64 formula over one row at a time, without padding, from the logits of the unpatched
model: no code of the library's loss, no shift done by a batch.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, TrainerCallback

from gft_kernels.data import digit_sum, scratch
from gft_kernels.integrations.response_rows import COLUMN, encode_row, response_rows

TAU = 0.04  # between the probabilities that a model of random weights gives its tokens, so that both branches occur
WINDOW = 8


def tokenizer():
    return scratch.character_tokenizer(digit_sum.ALPHABET)


def rows(count: int = 11) -> list[dict]:
    """Rows whose responses differ in length, in an order in which a mean of micro-batch means would be wrong.

    With a window of 8 the last step has 3 rows.
    """
    groups = []
    for index, row in enumerate(digit_sum.records(4)):
        texts = [text[: 4 + 5 * (index + place)] for place, text in enumerate(row["demonstrations"][:3])]
        groups.append({"prompt": row["prompt"], "responses": texts, "rewards": [1.0, 0.0, 0.25 * index]})
    return response_rows(groups)[:count]


def write_model(folder: Path, **config) -> None:
    """A Llama whose head is not tied, so that its gradient is seen by itself."""
    characters = tokenizer()
    model = scratch.small_llama(characters, width=32, layers=2, heads=2, context=128)
    model.config.update({"tie_word_embeddings": False, **config})
    torch.manual_seed(1)
    model = type(model)(model.config)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    characters.save_pretrained(folder)


def write_rows(path: Path, made: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in made))


def expected_steps(folder: Path, encoded: list[dict], window: int = WINDOW) -> list[tuple[float, dict]]:
    """Loss and gradients of each window of rows: sum of -A·C(pi)·log pi over its tokens, divided by their number."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).double()
    steps = []
    for start in range(0, len(encoded), window):
        part = encoded[start : start + window]
        tokens = sum(label != -100 for row in part for label in row["labels"])
        total = torch.zeros((), dtype=torch.float64)
        for row in part:
            log_pi = torch.log_softmax(model(torch.tensor([row["input_ids"]])).logits[0], -1)
            for place, label in enumerate(row["labels"]):
                if label != -100:
                    chosen = log_pi[place - 1, label]
                    coefficient = chosen.detach().exp() if chosen.detach().exp() < TAU else 1.0
                    total = total - row[COLUMN] * coefficient * chosen / tokens
        total.backward()
        steps.append((total.item(), {name: p.grad.float().clone() for name, p in model.named_parameters()}))
        model.zero_grad()
    return steps


def encoded_rows(made: list[dict] | None = None) -> list[dict]:
    return [encode_row(row, tokenizer()) for row in (made or rows())]


@contextlib.contextmanager
def in_every_trainer(callback: TrainerCallback):
    """The callback is one of those that any transformers.Trainer begins with, and so any trainer made of it."""
    before = list(transformers.trainer.DEFAULT_CALLBACKS)
    transformers.trainer.DEFAULT_CALLBACKS.append(callback)
    try:
        yield
    finally:
        transformers.trainer.DEFAULT_CALLBACKS[:] = before


class Gradients(TrainerCallback):
    """Keeps the gradients of every optimizer step, and the losses that were logged."""

    def __init__(self):
        self.steps: list[dict] = []
        self.losses: list[float] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        self.steps.append({name.removeprefix("module."): gradient.clone() for name, gradient in found.items()})

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


def assert_steps(seen: Gradients, expected: list[tuple[float, dict]], rtol: float = 2e-4) -> None:
    assert len(seen.steps) == len(expected)
    for got, (_, gradients) in zip(seen.steps, expected, strict=True):
        assert got.keys() == gradients.keys()
        for name, gradient in gradients.items():
            error = (got[name] - gradient).norm() / gradient.norm()
            assert error < rtol, f"{name}: relative error {error:.2e}"
    for loss, (wanted, _) in zip(seen.losses, expected, strict=False):
        assert abs(loss - wanted) < 1e-3 * max(1.0, abs(wanted))
