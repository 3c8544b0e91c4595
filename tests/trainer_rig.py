"""A trainer small enough to run in a test: character tokenizer, one-layer models of width 32, rows of digits."""

from __future__ import annotations

import torch
from transformers import TrainerCallback

from gft_kernels.data import scratch
from gft_kernels.trainer import GFTConfig, GFTTrainer

ALPHABET = "0123456789+=>.# ab"


def tokenizer():
    return scratch.character_tokenizer(ALPHABET)


def llama(seed=0):
    return scratch.small_llama(tokenizer(), width=32, layers=1, heads=2, context=64, seed=seed)


def untied_llama():
    """The head is a weight of its own."""
    model = llama()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.2)
    return model


def gpt2(dropout=0.1, seed=0):
    """Learned absolute positions and dropout: wrong positions and a lost random state both show."""
    options = {"initializer_range": 0.2, "activation_function": "gelu_new"}
    return scratch.small_gpt2(tokenizer(), 32, layers=1, heads=2, context=64, seed=seed, dropout=dropout, **options)


def digit_count(prompts, completions, answer, **columns):
    """Rewards that differ within a group: the number of digits, plus one for the right last character."""
    return [
        sum(c.isdigit() for c in text) / 8 + float(text.rstrip(".").endswith(gold))
        for text, gold in zip(completions, answer, strict=True)
    ]


def rows(count=8):
    """Prompts and demonstrations of different lengths."""
    made = []
    for i in range(count):
        a, b = (7 * i) % 10, (4 * i + 1) % 10
        total = str((a + b) % 10)
        prompt = f"{a}+{b}>" if i % 2 else f"{a}+{b}+0+0>"
        made.append({"prompt": prompt, "demonstrations": [f"{a}+{b}={total}.", f"#{total}."], "answer": total})
    return made


def offline_rows(count=8):
    """Groups of different sizes with fixed rewards; the third group's rewards are all equal."""
    made = []
    for i, row in enumerate(rows(count)):
        responses = [*row["demonstrations"], "0" * (1 + i % 5) + "."][: 2 + i % 2]
        rewards = [0.5] * len(responses) if i == 2 else [1.0, 0.25 * (i % 3), 0.0][: len(responses)]
        made.append({"prompt": row["prompt"], "responses": responses, "rewards": rewards})
    return made


def config(tmp_path, **options):
    defaults = {
        "output_dir": str(tmp_path), "num_demonstrations": 2, "num_generations": 2, "max_completion_length": 10,
        "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "max_steps": 2,
        "save_strategy": "no", "log_completions_steps": 0, "disable_tqdm": True, "use_cpu": True,
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    return GFTConfig(**{**defaults, **options})


def trainer(
    tmp_path, model=None, train=None, evaluation=None, reward_funcs=digit_count, callbacks=None, rollout_fn=None,
    kind=GFTTrainer, **options,
):  # fmt: skip
    model, train = llama() if model is None else model, rows() if train is None else train
    brought = {"reward_funcs": reward_funcs, "callbacks": callbacks, "rollout_fn": rollout_fn}
    return kind(model, config(tmp_path, **options), train, evaluation, tokenizer(), **brought)


def trained(trainer, **how) -> list[dict]:
    """What a run logs of its steps."""
    trainer.train(**how)
    return [line for line in trainer.state.log_history if "loss" in line]


def step_gradients(tmp_path, rows, micro_batch, accumulation, **options):
    """Gradients and losses of the steps of an epoch, cut into micro-batches."""
    seen = Gradients()
    once = {"max_steps": -1, "num_train_epochs": 1, "max_grad_norm": 0.0}
    once["optim"] = "sgd"  # Adam's first step takes the sign of the gradient, and so its rounding, for full
    cuts = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": accumulation}
    lines = trained(trainer(tmp_path, train=rows, callbacks=[seen], **cuts, **once, **options))
    return seen.steps, [line["loss"] for line in lines]


def response_log_probs(model, prompt, text, temperature=1.0):
    """(T,): log pi of the tokens of an unpadded response, its end token's too."""
    prompt, ids = tokenizer()(prompt)["input_ids"], [*tokenizer()(text)["input_ids"], 1]
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, -1)[torch.arange(len(ids)), torch.tensor(ids)]


class Gradients(TrainerCallback):
    """The gradient of every optimizer step, by name, and whole and flattened."""

    def __init__(self):
        self.named, self.steps = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        # none of DeepSpeed's, which keeps its own elsewhere; FSDP2's lie in parts
        self.named.append({n: (g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for n, g in found.items()})
        self.steps.append(torch.cat([g.flatten() for g in self.named[-1].values()]) if found else None)
