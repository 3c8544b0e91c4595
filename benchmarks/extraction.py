"""One task, one model, several trainers: `python -m benchmarks.extraction` trains with each, in a process of its own.

The task is the demo's (the date of a sentence as YYYY-MM-DD). A group is one right answer, one wrong one and four
samples; for TRL's GRPO, six samples. Written down for each trainer and seed: right held-out answers before and after,
seconds a step, peak memory of the process.
"""

from __future__ import annotations

import argparse
import gc
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import extraction_report, provenance
from benchmarks.kinds import linear
from gft_kernels.cli import extraction_demo as demo
from gft_kernels.data import answers, pretrained, text
from gft_kernels.model import patch_model, unpatch_model
from gft_kernels.trainer import GFTConfig, GFTTrainer, Sampling, generate

ROWS, REWARD, _ = demo.TASKS[demo.TASK]
VERIFY: Callable[..., list[float]] = getattr(answers, REWARD)
GROUP, GIVEN = 6, 2
Options = dict[str, Any]


def right(completions, answer, **columns) -> list[float]:
    """The demo's verifier, as TRL calls it: a completion of messages is a list of one message."""
    return VERIFY(None, [turn[0]["content"] for turn in completions], answer)


def gft_trainer(model, tokenizer, options: Options, **changes: Any) -> None:
    args = GFTConfig(**{**options, **demo.METHODS["gft"], **changes}, disable_tqdm=True, report_to="none")
    GFTTrainer(model, args, ROWS.read_rows(), None, tokenizer, reward_funcs=VERIFY).train()


def _with_trl(trainer: type, config: type, model, tokenizer, options: Options, **more: Any) -> None:
    from datasets import Dataset

    names = ("output_dir", "seed", "max_completion_length", "max_steps", "learning_rate", "lr_scheduler_type",
             "warmup_steps", "use_cpu", "save_strategy")  # fmt: skip
    args = config(
        per_device_train_batch_size=GROUP * options["per_device_train_batch_size"], num_generations=GROUP, bf16=False,
        report_to="none", disable_tqdm=True, gradient_checkpointing=False, logging_strategy="no",
        **{name: options[name] for name in names}, **more,
    )  # fmt: skip
    rows = Dataset.from_list(ROWS.read_rows())
    trainer(model, right, args, train_dataset=rows, processing_class=tokenizer).train()


def trl_adapter(model, tokenizer, options: Options) -> None:
    from gft_kernels.integrations.trl import GFTGRPOConfig, GFTGRPOTrainer

    _with_trl(GFTGRPOTrainer, GFTGRPOConfig, model, tokenizer, options, num_demonstrations=GIVEN)


def trl_grpo(model, tokenizer, options: Options) -> None:
    from trl import GRPOConfig, GRPOTrainer

    _with_trl(GRPOTrainer, GRPOConfig, model, tokenizer, options, beta=0.0)


def plain_loop(model, tokenizer, options: Options) -> None:
    """What patch_model asks of a loop: rewards, the size of a group, labels that leave out the prompts."""
    patch_model(model, tau=demo.METHODS["gft"]["tau"])
    optimizer = torch.optim.AdamW(model.parameters(), options["learning_rate"], weight_decay=0.0)
    ramp = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / options["warmup_steps"], 1.0))
    rows, ends = ROWS.read_rows(), text.end_tokens(tokenizer)
    random.Random(options["seed"]).shuffle(rows)
    torch.manual_seed(options["seed"])
    sampling = Sampling(GROUP - GIVEN, options["max_completion_length"], 1.0, ends, tokenizer.pad_token_id)
    size = options["per_device_train_batch_size"]
    for step in range(options["max_steps"]):
        texts, labels, rewards = [], [], []
        some = rows[step * size : (step + 1) * size]
        prompts = [text.encode_prompt(tokenizer, row["prompt"]) for row in some]
        samples = iter(generate(model, prompts, sampling))
        for row, prompt in zip(some, prompts, strict=True):
            given = [text.encode_response(tokenizer, d, row["prompt"], prompt) for d in row["demonstrations"]]
            group = [*given, *(next(samples) for _ in range(sampling.num_generations))]
            said = [text.decode(tokenizer, ids, ends) for ids in group]
            rewards += VERIFY(None, said, [row["answer"]] * GROUP)
            texts += [torch.tensor(prompt + ids) for ids in group]
            labels += [torch.tensor([-100] * len(prompt) + ids) for ids in group]
        model(
            input_ids=pad_sequence(texts, True, tokenizer.pad_token_id),
            attention_mask=pad_sequence([torch.ones_like(ids) for ids in texts], True),
            labels=pad_sequence(labels, True, -100), gft_rewards=torch.tensor(rewards), gft_group_size=GROUP,
        ).loss.backward()  # fmt: skip
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ramp.step()
        optimizer.zero_grad()


TRAINERS: dict[str, Callable] = {
    "GFTTrainer": gft_trainer,
    # the backward products cut at the error of bfloat16
    "GFTTrainer, filter_eps": partial(gft_trainer, filter_eps=linear.BFLOAT16_AUTO),
    "TRL adapter": trl_adapter,
    "plain loop": plain_loop,
    "TRL GRPO": trl_grpo,
    "SFT, same rows": partial(gft_trainer, **demo.METHODS["sft"]),
    "SFT, experts only": partial(gft_trainer, **demo.METHODS["sft"], num_demonstrations=1),
}


def measured(name: str, model_name: str, options: Options, held_out: int) -> dict[str, Any]:
    """One training: right answers by temperature before and after, seconds a step and the peak of this process."""
    folder = pretrained.located(model_name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = _rates(model, tokenizer, options, held_out)
    begun = time.perf_counter()
    TRAINERS[name](model, tokenizer, options)
    seconds = (time.perf_counter() - begun) / options["max_steps"]
    peak = demo.peak_gib()
    after = _rates(model, tokenizer, options, held_out)
    found = {"task": demo.TASK, "trainer": name, "seed": options["seed"], "n": held_out, "steps": options["max_steps"]}
    where = {"machine": provenance.machine(), "threads": torch.get_num_threads(), "commit": provenance.commit()}
    return {**found, "before": before, "after": after, "seconds_a_step": seconds, "peak_gib": peak, **where}


def _rates(model, tokenizer, options: Options, held_out: int) -> dict[str, float]:
    """Everyone is asked by the same evaluation, which leaves the model as it was."""
    args = GFTConfig(**{**options, "seed": 0}, disable_tqdm=True, report_to="none")
    rows = ROWS.read_rows(split="test")[:held_out]
    _unpatched(model)
    metrics = GFTTrainer(model, args, None, rows, tokenizer, reward_funcs=VERIFY).evaluate()
    _unpatched(model)
    gc.collect()
    return {name: metrics[key] for name, key in demo.TEMPERATURES.items()}


def _unpatched(model) -> None:
    if "_gft_forward" in vars(model):
        unpatch_model(model)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.extraction", description=__doc__.split("\n")[0])
    parser.add_argument("trainer", nargs="?", choices=sorted(TRAINERS), help="default: all, in turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--held-out", type=int, default=64, help="rows of an evaluation (default: %(default)s)")
    parser.add_argument("--busy", action="store_true", help="the machine does other work: keep no seconds")
    parser.add_argument("--save", type=Path, default=extraction_report.FILE, help="the results, a line a run")
    for name in ("max_steps", "max_completion_length"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=demo.SHARED[name])
    options = parser.parse_args()
    if options.trainer is None:
        for name in TRAINERS:
            subprocess.run([sys.executable, "-m", "benchmarks.extraction", name, *sys.argv[1:]], check=True)
        return
    changes = {name: getattr(options, name) for name in ("seed", "max_steps", "max_completion_length")}
    with tempfile.TemporaryDirectory() as folder:
        run = {**demo.SHARED, "output_dir": folder, **changes}
        found = measured(options.trainer, options.model, run, options.held_out)
    if options.busy:
        found["seconds_a_step"] = None
    extraction_report.keep(found, options.save)
    print({name: found[name] for name in ("trainer", "before", "after", "seconds_a_step", "peak_gib")}, flush=True)


if __name__ == "__main__":
    main()
