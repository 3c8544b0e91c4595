"""`gft init`: a commented configuration for rows of one's own, as a start."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from gft_kernels.cli.dry_run import local
from gft_kernels.cli.inputs import rows
from gft_kernels.cli.keys import TRAINING, Key, as_yaml, sections
from gft_kernels.data.answers import NUMBER, read_number
from gft_kernels.data.pretrained import located

OWN_REWARD = "rewards_of_mine:reward"
RESPONSES = 4  # sampled for a prompt
TOKENS = 32  # max_completion_length is a multiple of this
RATE = 1e-5  # the default, the paper's 1e-6, moves next to nothing in a run this short
LORA = {"peft": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}, "learning_rate": 1e-4}


def init(data: str, model: str, out: str, lora: bool = False) -> str:
    """Write the file, of a LoRA adapter or of all weights, and return what to do next.

    Raises: ValueError, OSError if the rows cannot be read or the file is there already.
    """
    path = Path(out)
    records = rows(data, None, "train")
    if not records:
        raise ValueError(f"DATA must hold rows, got none in {data!r}.")
    chosen = {"model": model, "data": data, "output_dir": f"runs/{Path(data).stem}", **of_rows(records, model)}
    chosen |= LORA if lora else {}
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text_of(chosen, f"{len(records)} rows of {data}, whose fields are {', '.join(records[0])}"))
    except FileExistsError:
        raise ValueError(f"--out must be a new file, got {out!r}, which exists; name another.") from None
    return "\n".join(next_steps(path, chosen))


def of_rows(records: Sequence[dict], model: str) -> dict[str, Any]:
    """What the rows decide: where the responses of a group come from, what rewards them, and how long they may be."""
    offline = records[0].get("responses") is not None
    texts = [record.get("responses" if offline else "demonstrations") or [] for record in records]
    chosen: dict[str, Any] = {"num_generations": 0 if offline else RESPONSES}
    if not offline:
        chosen |= {"num_demonstrations": min(map(len, texts)), "rewards": [ready_reward(records) or OWN_REWARD]}
    tokenizer = local(AutoTokenizer, located(model))
    every = [text for each in texts for text in each]
    if tokenizer is not None and every:
        longest = max(map(len, tokenizer(every)["input_ids"]))
        chosen["max_completion_length"] = -(-(longest + 1) // TOKENS) * TOKENS
    chosen |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "logging_steps": 1}
    chosen |= {"learning_rate": RATE, "max_steps": 100, "save_steps": 50, "save_total_limit": 2}
    return chosen | ({"bf16": True} if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else {})


def ready_reward(records: Sequence[dict]) -> str | None:
    """A reward that ships with the package, where the rows have the `answer` it compares with."""
    if not all("answer" in record for record in records):
        return None
    if any("\\boxed" in text for record in records for text in record.get("demonstrations") or []):
        return "boxed_answer"
    if any(isinstance(record["answer"], (dict, list)) for record in records):
        return "json_answer"
    experts = [((record.get("demonstrations") or [""])[0].strip(), str(record["answer"]).strip()) for record in records]
    answers = [answer.strip("#$% ") for _, answer in experts]
    if all(NUMBER.fullmatch(answer) and read_number(answer) is not None for answer in answers):
        return "last_number"
    return "exact_answer" if all(text == answer for text, answer in experts) else None


def text_of(chosen: dict[str, Any], data: str) -> str:
    """YAML: what is chosen, then every other key of ours at its default, as a comment."""
    lines = [f"# {data}.", "# Keys behind a # stand at their default; gft train --help lists the rest."]
    for title, keys in sections().items():
        lines += ["", f"# {title}"]
        for key in sorted(keys, key=lambda key: key.name not in chosen):
            if key.name in chosen or title != TRAINING:
                lines.append(line_of(key, chosen))
    return "\n".join(lines) + "\n"


def line_of(key: Key, chosen: dict[str, Any]) -> str:
    if key.name not in chosen:
        return f"# {key.name}: {key.default}".ljust(42) + f"  # {key.meaning}"
    return f"{key.name}: {as_yaml(chosen[key.name])}".ljust(42) + f"  # {key.meaning}"


def next_steps(path: Path, chosen: dict[str, Any]) -> list[str]:
    lines = [f"wrote        {path}"]
    if chosen.get("num_demonstrations") == 0:
        lines.append("groups       of samples alone: not every row has `demonstrations`, a list of texts")
    if chosen.get("rewards") == [OWN_REWARD]:
        lines += [
            "reward       none that is ready fits the rows: write rewards_of_mine.py beside where you train, with",
            "                 def reward(prompts, completions, **columns) -> list[float]",
        ]
    return [*lines, f"look         gft train --config {path} --dry-run", f"train        gft train --config {path}"]
