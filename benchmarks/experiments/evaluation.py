"""What a trained policy is worth on held-out prompts: pass@k, distinct solutions, entropy, KL to its base."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.experiments.scoring import demonstration, entropy_and_kl, log_probs, prompt_row
from benchmarks.experiments.settings import Evaluation
from benchmarks.experiments.statistics import mean
from gft_kernels.data.rows import Response
from gft_kernels.data.text import decode
from gft_kernels.trainer import Sampling
from gft_kernels.trainer.groups import Group
from gft_kernels.trainer.rewards import Rewards
from gft_kernels.trainer.rollouts import end_tokens, seeded

SCORED_SAMPLES = 4  # of each prompt's samples, for entropy and KL


def evaluate(model, base_model, task, rows: Sequence[dict], settings: Evaluation, longest: int, seed: int) -> dict:
    """The metrics of one policy; the random numbers depend on `seed` alone."""
    samples = settings.samples
    groups = sample_groups(model, task, rows, samples, longest, seed)
    right = [sum(r.reward > 0.5 for r in group.responses) for group in groups]
    distinct = [len({r.text for r in group.responses if r.reward > 0.5}) for group in groups]
    powers = [2**i for i in range(samples.bit_length()) if 2**i <= samples]
    found = {
        "pass_at": {str(k): mean([pass_at(k, samples, c) for c in right]).value for k in powers},
        "distinct": mean(distinct).value,
        "right_of_each": right,
        "distinct_of_each": distinct,
    }
    if settings.scored == 0:
        return found
    scored = [Group(group.row, group.responses[:SCORED_SAMPLES]) for group in groups[: settings.scored]]
    entropy, kl = entropy_and_kl(model, base_model, scored)
    experts = [demonstration(task.tokenizer, row) for row in rows[: settings.scored]]
    return found | {"entropy": entropy, "kl": kl, "expert_log_likelihood": float(log_probs(model, experts).mean())}


def sample_groups(model, task, rows, samples, longest, seed) -> list[Group]:
    """Each prompt's samples at temperature 1, rewarded."""
    tokenizer = task.tokenizer
    checked = [prompt_row(tokenizer, row) for row in rows]
    ends = end_tokens(model, tokenizer)
    sampling = Sampling(samples, longest, 1.0, ends, tokenizer.pad_token_id, share_prompts=True)
    with seeded(seed, device=model.device):
        completions = task.rollout(model, [row.prompt_ids for row in checked], sampling)
    responses = [Response(decode(tokenizer, ids, ends), ids, "sampled") for ids in completions]
    groups = [Group(row, responses[i * samples : (i + 1) * samples]) for i, row in enumerate(checked)]
    repeated = [group.row for group in groups for _ in group.responses]
    totals, _ = Rewards(task.rewards).score(repeated, [response.text for response in responses])
    for response, total in zip(responses, totals, strict=True):
        response.reward = total
    return groups


def pass_at(k: int, samples: int, right: int) -> float:
    """Probability that k of the samples, drawn without replacement, hold a right one: the unbiased estimate.

    Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", arXiv 2107.03374.
    """
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)
