"""GFT in a plain PyTorch loop: answers of different lengths, gradient accumulation, one process or several.

    python examples/plain_pytorch.py
    torchrun --nproc-per-node 2 examples/plain_pytorch.py

The task: count from a digit up to 9 and stop ("6" is answered by "789."). The groups hold the right answer, written by
an expert, and sampled ones; a sampled answer is rewarded by the share of it that is right. Every step prints the same
line, but for rounding, whatever the number of processes and micro-batches: the loss is divided by the tokens of the
whole step.

Sizes: S answers, T positions, V vocabulary.
"""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gft_kernels import gft_loss

STOP, VOCABULARY = 10, 11  # digits, then the end of an answer
LENGTH = 10
IGNORED = -100


class Policy(nn.Module):
    """Logits (S, T, V): row t predicts token t of the answer, from the question and the tokens before t."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.memory = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, questions_S: Tensor, answers_ST: Tensor) -> Tensor:
        seen_ST = torch.cat([questions_S[:, None], answers_ST[:, :-1]], dim=1)
        return self.head(self.memory(self.embedding(seen_ST))[0])


def expert(questions_S: Tensor) -> Tensor:
    """Digits up to 9, then stops to the end."""
    return (questions_S[:, None] + 1 + torch.arange(LENGTH)).clamp(max=STOP)


@torch.no_grad()
def sample(policy: Policy, questions_S: Tensor, noise_STV: Tensor) -> Tensor:
    """One answer per question. The noise comes from outside, so that an answer does not depend on who samples it."""
    answers_ST = torch.full((len(questions_S), LENGTH), STOP)
    for t in range(LENGTH):
        answers_ST[:, t] = (policy(questions_S, answers_ST)[:, t] + noise_STV[:, t]).argmax(-1)
    ended_ST = (answers_ST == STOP).cumsum(1) > 0
    return answers_ST.masked_fill(ended_ST, STOP)


def reward(questions_S: Tensor, answers_ST: Tensor) -> Tensor:
    """The share of the first tokens that are right, up to the first wrong one."""
    return (answers_ST == expert(questions_S)).cumprod(1).float().mean(1)


def only_first_stop(answers_ST: Tensor) -> Tensor:
    """Targets: the answer with its first stop; what comes after it does not count."""
    after_ST = (answers_ST == STOP).cumsum(1) > 1
    return answers_ST.masked_fill(after_ST, IGNORED)


def rollout(policy: Policy, step: int, options: argparse.Namespace, rank: int, ranks: int) -> tuple[Tensor, ...]:
    """This process's share of the step's groups: questions (S,), answers (S, T), rewards (S,)."""
    generator = torch.Generator().manual_seed(step)
    questions = torch.randint(9, (options.prompts,), generator=generator)
    uniform = torch.rand(options.prompts, options.group_size, LENGTH, VOCABULARY, generator=generator)
    noise = -torch.log(-torch.log(uniform))  # Gumbel: logits + noise, argmax, is a sample
    mine = slice(rank * options.prompts // ranks, (rank + 1) * options.prompts // ranks)
    questions_S = questions[mine].repeat_interleave(options.group_size)
    answers_ST = sample(policy, questions_S, noise[mine].flatten(0, 1))
    answers_ST[:: options.group_size] = expert(questions[mine])
    return questions_S, answers_ST, reward(questions_S, answers_ST)


def all_ranks(value: Tensor) -> Tensor:
    """The sum over all processes."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def train_step(model: nn.Module, policy: Policy, optimizer, step: int, options: argparse.Namespace) -> str:
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    questions_S, answers_ST, rewards_S = rollout(policy, step, options, rank, ranks)
    targets_ST = only_first_stop(answers_ST)

    # The denominator is decided before the first micro-batch: the tokens of the whole step, on all ranks. DDP averages
    # gradients over the ranks, so each passes its share of the count.
    tokens = all_ranks((targets_ST != IGNORED).sum())
    micro = options.group_size * options.prompts_per_micro_batch  # whole groups only: an advantage needs its siblings
    starts = range(0, len(rewards_S), micro)
    total = torch.zeros(())
    for start in starts:
        part = slice(start, start + micro)
        last = start == starts[-1]
        with nullcontext() if last or model is policy else model.no_sync():
            loss = gft_loss(
                model(questions_S[part], answers_ST[part]),
                targets_ST[part],
                rewards=rewards_S[part],
                group_size=options.group_size,
                tau=options.tau,
                num_items_in_batch=tokens / ranks,
                ignore_index=IGNORED,
            )
            loss.backward()  # not divided again: the parts already add up to the loss of the step
        total += loss.detach() / ranks

    norm = nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    sampled = rewards_S.view(-1, options.group_size)[:, 1:]
    mean = all_ranks(sampled.sum()) / (options.prompts * (options.group_size - 1))
    return f"step {step:3}  loss {all_ranks(total):+.5f}  gradient norm {norm:.5f}  sampled reward {mean:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--prompts", type=int, default=16, help="per step, over all processes")
    parser.add_argument("--prompts-per-micro-batch", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--tau", type=float, default=0.7)
    options = parser.parse_args()

    if "WORLD_SIZE" in os.environ:  # started by torchrun
        dist.init_process_group("gloo")
        if options.prompts < dist.get_world_size():
            parser.error(f"--prompts must be at least the number of processes, got {options.prompts}")
    torch.manual_seed(0)
    policy = Policy()
    model = DistributedDataParallel(policy) if dist.is_initialized() else policy
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for step in range(options.steps):
        line = train_step(model, policy, optimizer, step, options)
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(line, flush=True)
    if dist.is_initialized():
        dist.barrier()  # nobody leaves while a thread of gloo still holds a tensor of the last reduction
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
