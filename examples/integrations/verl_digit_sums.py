"""GFT with verl's parts on one process: its registry's `gft` loss, its agg_loss and its GRPO advantages.

    pip install verl gft-kernels
    python examples/integrations/verl_digit_sums.py

verl itself samples on GPUs; this loop samples by `generate` and is otherwise what verl's actor does in a step, without
Ray, on the sum of five digits (gft_kernels.data.digit_sum), about a minute on one core of a CPU. With
examples/integrations/verl.yaml the same loss runs in verl's own trainer.

Sizes: S responses, T tokens of the longest, P of a prompt (the same for all), V vocabulary.
"""

from __future__ import annotations

import argparse
import random
import tempfile

import torch
from torch.nn.utils.rnn import pad_sequence
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage, get_policy_loss_fn
from verl.workers.config import ActorConfig

from gft_kernels.data import digit_sum, scratch
from gft_kernels.data.text import encode_response
from gft_kernels.integrations.verl import GFTPolicyLossConfig
from gft_kernels.trainer import GFTConfig, GFTTrainer, Sampling, generate

PROMPTS, GIVEN, SAMPLED, LONGEST = 16, 4, 4, 34


def base_model(tokenizer, steps: int):
    """A small model that solves a third of the sums, by SFT."""
    model = scratch.small_gpt2(tokenizer, width=64, layers=2, heads=4, context=64)
    with tempfile.TemporaryDirectory() as folder:
        args = GFTConfig(
            folder,
            advantages="ones",
            tau=0.0,
            num_demonstrations=1,
            num_generations=0,
            max_completion_length=LONGEST,
            max_steps=steps,
            per_device_train_batch_size=32,
            learning_rate=4e-3,
            lr_scheduler_type="cosine",
            warmup_steps=50,
            token_metrics=False,
            log_completions_steps=0,
            logging_steps=max(steps // 4, 1),
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        )
        GFTTrainer(model, args, digit_sum.base_records(32 * steps), None, tokenizer).train()
    return model


def responses(model, tokenizer, rows: list[dict], given: int, sampled: int) -> list[list[int]]:
    """Token ids of each row's first demonstrations, then of samples of the policy."""
    sampling = Sampling(sampled, LONGEST, 1.0, (tokenizer.eos_token_id,), tokenizer.pad_token_id)
    drawn = iter(generate(model, [tokenizer(row["prompt"])["input_ids"] for row in rows], sampling))
    groups = []
    for row in rows:
        groups += [encode_response(tokenizer, text) for text in row["demonstrations"][:given]]
        groups += [next(drawn) for _ in range(sampled)]
    return groups


def score(tokenizer, rows: list[dict], ids: list[list[int]]) -> torch.Tensor:
    """(S,) rewards: 1 for a right solution."""
    size = len(ids) // len(rows)
    prompts = [row["prompt"] for row in rows for _ in range(size)]
    return torch.tensor(digit_sum.strict(prompts, tokenizer.batch_decode(ids, skip_special_tokens=True)))


def log_probs(model, prompts_SP: torch.Tensor, responses_ST: torch.Tensor) -> torch.Tensor:
    """(S, T) log pi of each response token, in nats."""
    logits_STV = model(torch.cat([prompts_SP, responses_ST], 1)).logits[:, prompts_SP.shape[1] - 1 : -1]
    return torch.log_softmax(logits_STV, -1).gather(2, responses_ST[..., None])[..., 0]


def step(model, optimizer, tokenizer, rows: list[dict], config: ActorConfig) -> dict[str, float]:
    ids = responses(model, tokenizer, rows, GIVEN, SAMPLED)
    rewards_S = score(tokenizer, rows, ids)
    responses_ST = pad_sequence([torch.tensor(x) for x in ids], batch_first=True, padding_value=tokenizer.pad_token_id)
    mask_ST = torch.arange(responses_ST.shape[1]) < torch.tensor([[len(x)] for x in ids])
    last_ST = mask_ST & ~torch.roll(mask_ST, -1, 1)  # verl's rewards lie on the last token of a response
    last_ST[:, -1] = mask_ST[:, -1]
    group_S = torch.arange(len(rows)).repeat_interleave(GIVEN + SAMPLED)
    advantages_ST, _ = compute_grpo_outcome_advantage(rewards_S[:, None] * last_ST, mask_ST, group_S.numpy())
    prompts_SP = torch.tensor([tokenizer(row["prompt"])["input_ids"] for row in rows])[group_S]

    log_probs_ST = log_probs(model, prompts_SP, responses_ST)
    config.global_batch_info.update(dp_size=1, batch_num_tokens=int(mask_ST.sum()), global_batch_size=len(ids))
    loss, metrics = get_policy_loss_fn(config.policy_loss.loss_mode)(
        old_log_prob=log_probs_ST.detach(),
        log_prob=log_probs_ST,
        advantages=advantages_ST,
        response_mask=mask_ST,
        loss_agg_mode=config.loss_agg_mode,
        config=config,
    )
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return {"loss": loss.item(), "reward": rewards_S.mean().item(), **metrics}


def held_out(model, tokenizer) -> float:
    """The share of right samples, at temperature 1, for prompts the policy has not seen."""
    rows = digit_sum.read_rows(split="test")
    return score(tokenizer, rows, responses(model, tokenizer, rows, 0, 4)).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sft-steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = scratch.character_tokenizer(digit_sum.ALPHABET)
    model = base_model(tokenizer, options.sft_steps)
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=GIVEN + SAMPLED,
        ppo_micro_batch_size_per_gpu=PROMPTS * (GIVEN + SAMPLED),
        policy_loss=GFTPolicyLossConfig(tau=0.7),
        loss_agg_mode="token-mean",
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=7e-4, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    rows, order = digit_sum.read_rows(), random.Random(0)
    before = held_out(model, tokenizer)
    for number in range(1, options.steps + 1):
        metrics = step(model, optimizer, tokenizer, order.sample(rows, PROMPTS), config)
        schedule.step()
        if number % max(options.steps // 12, 1) == 0:
            print(f"step {number:3}", *(f"{name} {value:.4f}" for name, value in metrics.items()), sep="  ", flush=True)
    after = held_out(model, tokenizer)
    print(f"held-out reward {before:.3f} before, {after:.3f} after {options.steps} steps", flush=True)


if __name__ == "__main__":
    main()
