"""Hidden states of a real language model over real answers: `python -m benchmarks.recorded` records them.

SmolLM2-135M-Instruct reads prompts of the extraction tasks with the expert's and the teacher's answers; kept are its
last hidden states where they predict a token of an answer, in float16, and these tokens. The head that turns them into
logits is 49,152 × 576 and not kept: `head()` takes it from the model where that is on this machine. Its rows are as
peaked and as wrong as those of a run: random states and heads have neither.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from gft_kernels.data import dates, extract_json, pretrained, text

FILE = Path(__file__).parent / "recorded" / "smollm2-answers.npz"


class Answers(NamedTuple):
    hidden_ND: Tensor  # float16, N tokens of answers, D = 576
    targets_N: Tensor  # int64, the token each predicts
    response_N: Tensor  # int64, whose token it is; even: an expert's answer, odd: a teacher's


def answers(rows: int | None = None) -> Answers:
    """What was recorded; more rows than that the model reads now. Raises as `head` does, where it must."""
    with numpy.load(FILE) as file:
        hidden, targets, responses = (torch.from_numpy(file[name]) for name in ("hidden", "targets", "responses"))
    found = Answers(hidden, targets.long(), responses.long())
    if rows is None:
        return found
    if rows > len(found.targets_N):
        found = read(2 + rows // 20)  # of each task, two answers a row: never fewer than 20 tokens together
    return Answers(*(part[:rows] for part in found))


def head() -> Tensor:
    """The model's head (V, D) float32. Raises ValueError, with the command that installs it, where it is not here."""
    from safetensors import safe_open

    with safe_open(Path(pretrained.located("smollm2"), "model.safetensors"), "pt") as file:
        return file.get_tensor("model.embed_tokens.weight")  # tied


@torch.no_grad()
def read(count: int) -> Answers:
    """The states and tokens of `count` held-out rows of each task, with two answers each."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = pretrained.located("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    hidden, targets, responses = [], [], []
    for task in (extract_json, dates):
        for row in task.records(count, "test", seed=2):
            prompt = text.encode_prompt(tokenizer, row["prompt"])
            for answer in row["demonstrations"]:
                ids = text.encode_response(tokenizer, answer, row["prompt"], prompt)
                states_LD = model.base_model(torch.tensor([prompt + ids])).last_hidden_state[0]
                hidden.append(states_LD[len(prompt) - 1 : -1].half())
                responses += [len(hidden) - 1] * len(ids)
                targets += ids
    return Answers(torch.cat(hidden), torch.tensor(targets), torch.tensor(responses))


if __name__ == "__main__":
    found = read(4)
    FILE.parent.mkdir(parents=True, exist_ok=True)
    kept = {"hidden": found.hidden_ND, "targets": found.targets_N.int(), "responses": found.response_N.short()}
    numpy.savez_compressed(FILE, **{name: tensor.numpy() for name, tensor in kept.items()})
    print(f"{FILE}: {FILE.stat().st_size / 1e3:.0f} kB, {len(found.targets_N)} rows")
