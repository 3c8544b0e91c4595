"""What the examples of this folder share: a small base model, scored responses to train on, and a held-out measure.

The task is gft_kernels.data.digit_sum: sum five digits step by step; the reward is 1 if every step is right. The
responses are an expert's and three teachers', who slip often enough for a group to hold right and wrong ones.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gft_kernels.data import digit_sum, scratch
from gft_kernels.integrations.response_rows import encode_row, response_rows
from gft_kernels.model.patch import patch_model, unpatch_model


def rows(prompts: int = 256, seed: int = 1) -> list[dict]:
    """One row per response: prompt, response, gft_advantages."""
    groups = []
    for row in digit_sum.records(prompts, teacher_noise=0.15, seed=seed):
        responses = row["demonstrations"]
        rewards = digit_sum.strict([row["prompt"]] * len(responses), responses)
        groups.append({"prompt": row["prompt"], "responses": responses, "rewards": rewards})
    return response_rows(groups)


def write_rows(path: Path, prompts: int = 256) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(prompts)))


def write_base_model(folder: Path, steps: int = 150) -> None:
    """A Llama of 0.1 M parameters that has seen the task's forms, fitted with A = 1 and tau = 0, which is SFT."""
    tokenizer = scratch.character_tokenizer(digit_sum.ALPHABET)
    model = patch_model(scratch.small_llama(tokenizer, width=64, layers=2, heads=4, context=64), tau=0.0)
    texts = digit_sum.base_records(32 * steps)
    pairs = [
        encode_row({"prompt": t["prompt"], "response": t["demonstrations"][0], "gft_advantages": 1.0}, tokenizer)
        for t in texts
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step in range(steps):
        model(**batch(pairs[32 * step : 32 * (step + 1)], tokenizer.pad_token_id)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    unpatch_model(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def batch(encoded: list[dict], pad_id: int) -> dict[str, torch.Tensor]:
    """Rows of `encode_row`, padded on the right: input_ids, attention_mask, labels (S, L), gft_advantages (S,)."""
    length = max(len(row["input_ids"]) for row in encoded)
    fill = {"input_ids": pad_id, "attention_mask": 0, "labels": -100}
    columns = {
        name: torch.tensor([row[name] + [value] * (length - len(row[name])) for row in encoded])
        for name, value in fill.items()
    }
    return {**columns, "gft_advantages": torch.tensor([row["gft_advantages"] for row in encoded])}


@torch.no_grad()
def margin(model, tokenizer, prompts: int = 128) -> float:
    """How much likelier per token, in nats, held-out responses of advantage > 0 are than those of advantage < 0."""
    held_out = rows(prompts, seed=9)
    columns = batch([encode_row(row, tokenizer) for row in held_out], tokenizer.pad_token_id)
    logits = model.eval()(columns["input_ids"], attention_mask=columns["attention_mask"]).logits[:, :-1]
    labels = columns["labels"][:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    per_token = -losses.sum(1) / (labels != -100).sum(1)
    good, bad = columns["gft_advantages"] > 0, columns["gft_advantages"] < 0
    return float(per_token[good].mean() - per_token[bad].mean())


def margin_of(folder: str | Path) -> float:
    """The same for a model saved in a folder with its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return margin(model, AutoTokenizer.from_pretrained(folder))


def report(before: float, after: float) -> None:
    print(
        f"right held-out answers are likelier than wrong ones by {before:+.3f} nats a token before, {after:+.3f} after"
    )
