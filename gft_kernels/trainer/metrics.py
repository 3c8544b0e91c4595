"""What a run reports: means between two log lines, signs of a collapse, held-out metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gft_kernels.data.rows import Response, Row
from gft_kernels.options import TokenStats
from gft_kernels.trainer.config import GFTConfig
from gft_kernels.trainer.groups import SOURCES, Group, count_items
from gft_kernels.trainer.rewards import Rewards

GROUP_METRICS = (*(f"reward/{s}" for s in SOURCES), "zero_std_groups", "truncated", "completion_length",
                 "resampled_groups", "demonstrations")  # fmt: skip
TOKEN_METRICS = ("pi", "rectified", "clipped", "entropy", "kl_to_start")
DRIFT_METRICS = ("drift/kl", "drift/mean_abs_log_ratio", "drift/outside_clip")
RATES = ("tokens_per_second/sampling", "tokens_per_second/training")
LARGEST, SMALLEST = ("drift/max_abs_log_ratio",), ("min_log_prob",)


class Means:
    """Weighted means and extremes by name, over every micro-batch and rank since the last drain."""

    def __init__(self, device: torch.device):
        # Every rank holds every name in the same order, so that one sum over ranks is enough.
        self.names = (*GROUP_METRICS, *TOKEN_METRICS, *DRIFT_METRICS, *RATES, "tokens")
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(len(self.names), 2, dtype=dtype, device=device)
        self.extremes = torch.full((len(LARGEST + SMALLEST),), -torch.inf, dtype=dtype, device=device)

    def add(self, name: str, total, count) -> None:
        """One more term of a mean. Tensors stay on their device: nothing waits for it before the log line."""
        row = self.sums[self.names.index(name)]
        row[0] += total
        row[1] += count

    def add_extreme(self, name: str, values: Tensor) -> None:
        """Values of which the log line gives the largest, or for a name in SMALLEST the smallest."""
        i = (LARGEST + SMALLEST).index(name)
        largest = values.max() if name in LARGEST else -values.min()
        self.extremes[i] = torch.maximum(self.extremes[i], largest.to(self.extremes.dtype))

    def add_groups(self, groups: Sequence[Group], config: GFTConfig) -> None:
        """Rewards and lengths of a step's groups, those that were left out of it among them."""
        responses = [r for g in groups for r in g.responses]
        for source in SOURCES:
            rewards = [r.reward for r in responses if r.source == source and r.reward == r.reward]
            self.add(f"reward/{source}", sum(rewards), len(rewards))
        sampled = [r for r in responses if r.source == "sampled"]
        number = sum(g.share for g in groups)  # a group that is cut over steps counts once
        self.add("zero_std_groups", sum(g.share for g in groups if g.is_silent), number)
        if config.dynamic_sampling == "resample":
            self.add("resampled_groups", sum(g.share for g in groups if g.resampled), number)
        if config.curriculum:
            self.add("demonstrations", len(responses) - len(sampled), number)
        self.add("truncated", sum(r.truncated for r in sampled), len(sampled))
        self.add("completion_length", sum(len(r.ids) for r in sampled), len(sampled))
        self.add("tokens", count_items(groups, "token-mean"), 1)

    def add_step(self, stats: TokenStats, live_ST: Tensor, inputs: dict[str, Tensor], clip: tuple) -> None:
        """What a micro-batch's forward says of its tokens, and of the policies that sampled and started."""
        self.add_tokens(stats, live_ST)
        if "old_log_probs" in inputs:
            self.add_drift(stats.log_probs, inputs["old_log_probs"], inputs["sources"], live_ST, clip)
        if "ref_log_probs" in inputs:
            log_ratio_ST = inputs["ref_log_probs"] - stats.log_probs
            self.add_sampled_kl("kl_to_start", log_ratio_ST, inputs["sources"], live_ST)

    def add_tokens(self, stats: TokenStats, live_ST: Tensor) -> None:
        """Of the live positions (S, T): mean pi and entropy, the least log pi, and where the loss held back.

        That is the fraction with C(pi) < 1, or, of an objective with a ratio, the fraction that is clipped.
        """
        count = live_ST.sum()
        self.add("pi", (stats.log_probs.exp() * live_ST).sum(), count)
        assert stats.entropy is not None
        self.add("entropy", (stats.entropy * live_ST).sum(), count)
        self.add_extreme("min_log_prob", stats.log_probs * live_ST)
        if stats.clipped is None:
            self.add("rectified", ((stats.coefficients < 1) & live_ST).sum(), count)
        else:
            self.add("clipped", (stats.clipped & live_ST).sum(), count)

    def add_sampled_kl(self, name: str, log_ratio_ST: Tensor, sources_S: Tensor, live_ST: Tensor) -> None:
        """Mean over sampled tokens of r - 1 - log r: the KL from the policy that sampled to r times it, in nats."""
        live_ST = live_ST & (sources_S == SOURCES.index("sampled"))[:, None]
        log_ratio_ST = torch.where(live_ST, log_ratio_ST, 0.0)
        self.add(name, (log_ratio_ST.expm1() - log_ratio_ST).sum(), live_ST.sum())

    def add_drift(self, log_probs_ST: Tensor, old_ST: Tensor, sources_S: Tensor, live_ST: Tensor, clip: tuple) -> None:
        """How far the policy has moved since it sampled, over live positions; clip: (lowest, highest) near ratio."""
        log_ratio_ST = torch.where(live_ST, log_probs_ST - old_ST, 0.0)
        ratio_ST, count = log_ratio_ST.exp(), live_ST.sum()
        self.add("drift/mean_abs_log_ratio", log_ratio_ST.abs().sum(), count)
        self.add_extreme("drift/max_abs_log_ratio", log_ratio_ST.abs())
        self.add("drift/outside_clip", ((ratio_ST < clip[0]) | (ratio_ST > clip[1])).sum(), count)
        self.add_sampled_kl("drift/kl", log_ratio_ST, sources_S, live_ST)

    def drain(self, accelerator, seconds: float, aside: float = 0.0) -> dict[str, float]:
        """What was added on all ranks, by name, names without a term left out, and the response tokens a second.

        `aside`: of the seconds since the last drain, those of rollouts, their rewards, and evaluation.
        """
        self.add("tokens_per_second/training", self.sums[self.names.index("tokens")][0], seconds - aside)
        sums = accelerator.reduce(self.sums, reduction="sum").tolist()
        extremes = accelerator.gather(self.extremes[None]).amax(0).tolist()
        self.sums.zero_()
        self.extremes.fill_(-torch.inf)
        named = dict(zip(self.names, sums, strict=True))
        tokens, steps = named.pop("tokens")
        drained = {name: total / count for name, (total, count) in named.items() if count > 0}
        drained |= {name: drained[name] * accelerator.num_processes for name in RATES if name in drained}
        for name, value in zip(LARGEST + SMALLEST, extremes, strict=True):
            if value > -math.inf:
                drained[name] = value if name in LARGEST else -value
        return drained | ({"tokens_per_second": tokens / seconds} if steps and seconds > 0 else {})


# A run that comes apart. What a sign needs of the past is in the log history, so a resumed run goes on as if unstopped.

ENTROPY_GROWTH, ENTROPY_MARGIN = 2.0, 0.5
"""Entropy (nats) may grow to this multiple of the first log line's, plus this margin. Fitting and reinforcing both
lower the entropy of response tokens; twice the start is noise being learned. The margin keeps a start near 0 from
counting as growth."""

LEAST_LOG_PROB, LOG_PROB_FALL = -50.0, 25.0
"""A response token below e^-50 that is also 25 nats below the first log line's. A language model's least likely token
in real text lies around -20 to -30; one that negative advantages push on, with nothing to hold it, falls on and on."""

SILENT_WINDOWS = 3
"""Log lines in a row in which every group's rewards are equal. One may be chance; three are a reward that does not tell
responses apart, or a policy that always does the same."""

SIGNS = {  # flag: (the metric it watches, what values of the log lines show it, the warning)
    "collapse/entropy": (
        "entropy",
        lambda values: values[-1] > ENTROPY_GROWTH * values[0] + ENTROPY_MARGIN,
        "entropy must stay near where it started, got {last:.3g} nats after {first:.3g}; "
        "lower learning_rate or entropy_coef, or go back to a checkpoint",
    ),
    "collapse/min_log_prob": (
        "min_log_prob",
        lambda values: values[-1] < min(LEAST_LOG_PROB, values[0] - LOG_PROB_FALL),
        "the least log-probability of a response token must stay bounded, got {last:.0f} nats after {first:.0f}; "
        "lower learning_rate; with objective gft, raise tau and leave rectify at 'all'",
    ),
    "collapse/silent_groups": (
        "zero_std_groups",
        lambda values: len(values) >= SILENT_WINDOWS and set(values[-SILENT_WINDOWS:]) == {1.0},
        f"rewards must differ within groups, got equal ones in every group for {SILENT_WINDOWS} log lines; "
        "look at completions.jsonl: nothing is being learned",
    ),
}


def signs_of_collapse(history: Sequence[dict], line: dict) -> tuple[dict[str, float], list[str]]:
    """The flags of a log line (1 where a sign shows), and a sentence for each that the line before did not have."""
    flags: dict[str, float] = {}
    sentences = []
    before: dict = next((earlier for earlier in reversed(history) if "zero_std_groups" in earlier), {})
    for flag, (metric, shows, sentence) in SIGNS.items():
        values = [entry[metric] for entry in (*history, line) if metric in entry]
        if metric in line:
            flags[flag] = float(shows(values))
            if flags[flag] and not before.get(flag):
                sentences.append(sentence.format(first=values[0], last=values[-1]))
    return flags, sentences


# Evaluation


def heldout_lines(rows: Sequence[Row], sampled: Sequence[Sequence[Response]], rewards: Rewards) -> list[list[float]]:
    """A line of numbers per row over its responses: truncated, length, reward; sum and count of each function's;
    count of those some function applies to, which the reward is the mean of (NaN: none)."""
    lines = []
    for row, responses in zip(rows, sampled, strict=True):
        parts = rewards.parts([row] * len(responses), [r.text for r in responses])
        totals = applicable([rewards.total(values) for values in zip(*parts, strict=True)])
        line = [float(np.mean([r.truncated for r in responses])), float(np.mean([len(r.ids) for r in responses]))]
        line.append(float(np.mean(totals)) if totals else math.nan)
        for values in map(applicable, parts):
            line += [sum(values), len(values)]
        lines.append([*line, len(totals)])
    return lines


def applicable(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def heldout_summary(names: Sequence[str], temperatures: Sequence[float] = (0.0,)):
    """compute_metrics for evaluation: from a line per row (GFTTrainer.prediction_step) to named means.

    The metrics of every temperature but the first have it behind their names: "reward_greedy", "reward_at_0.7".
    """

    def summarise(prediction) -> dict[str, float]:
        lines = np.asarray(prediction.predictions, dtype=np.float64).T
        (log_prob, tokens), sampled = lines[:2], lines[2:].reshape(len(temperatures), -1, lines.shape[1])
        summary = {}
        if tokens.sum() > 0:
            summary["expert_log_likelihood"] = log_prob.sum() / tokens.sum()
            summary["loss"] = -summary["expert_log_likelihood"]
        for place, (temperature, columns) in enumerate(zip(temperatures, sampled, strict=True)):
            behind = "" if place == 0 else f"_at_{temperature:g}" if temperature else "_greedy"
            summary |= {name + behind: value for name, value in sampled_summary(names, columns).items()}
        return {name: float(value) for name, value in summary.items()}

    return summarise


def sampled_summary(names: Sequence[str], columns: np.ndarray) -> dict[str, float]:
    """Named means of the responses of one temperature; columns: of `heldout_lines`, a row each."""
    truncated, length, reward, *parts, rewarded = columns
    summary = {"truncated": truncated.mean(), "completion_length": length.mean()}
    if rewarded.sum() > 0:
        summary["reward"] = np.nansum(reward * rewarded) / rewarded.sum()
    for name, total, count in zip(names, parts[::2], parts[1::2], strict=True) if len(names) > 1 else ():
        if count.sum() > 0:  # over the responses it applies to
            summary[f"reward_{name}"] = total.sum() / count.sum()
    return summary
