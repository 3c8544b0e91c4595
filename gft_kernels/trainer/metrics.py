"""What a run reports: means over the steps between two log lines, the table of completions, the held-out summary."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gft_kernels.options import TokenStats
from gft_kernels.trainer.groups import SOURCES, Group

GROUP_METRICS = (*(f"reward/{s}" for s in SOURCES), "zero_std_groups", "truncated", "completion_length")
TOKEN_METRICS = ("pi", "rectified", "clipped", "entropy", "kl_to_start")
DRIFT_METRICS = ("drift/kl", "drift/mean_abs_log_ratio", "drift/outside_clip")
LARGEST, SMALLEST = ("drift/max_abs_log_ratio",), ("min_log_prob",)


class Means:
    """Weighted means and extremes by name, over every micro-batch and rank since the last drain."""

    def __init__(self, device: torch.device):
        # Every rank holds every name in the same order, so that one sum over ranks is enough.
        self.names = (*GROUP_METRICS, *TOKEN_METRICS, *DRIFT_METRICS, "tokens")
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

    def add_groups(self, groups: Sequence[Group], eos_ids: Sequence[int]) -> None:
        responses = [r for g in groups for r in g.responses]
        for source in SOURCES:
            rewards = [r.reward for r in responses if r.source == source and r.reward == r.reward]
            self.add(f"reward/{source}", sum(rewards), len(rewards))
        sampled = [r for r in responses if r.source == "sampled"]
        self.add("zero_std_groups", sum(all(r.advantage == 0 for r in g.responses) for g in groups), len(groups))
        self.add("truncated", sum(r.ids[-1] not in eos_ids for r in sampled), len(sampled))
        self.add("completion_length", sum(len(r.ids) for r in sampled), len(sampled))
        self.add("tokens", sum(len(r.ids) for r in responses), 1)

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

    def drain(self, accelerator, seconds: float) -> dict[str, float]:
        """What was added on all ranks, by name, names without a term left out, and the response tokens a second."""
        sums = accelerator.reduce(self.sums, reduction="sum").tolist()
        extremes = accelerator.gather(self.extremes[None]).amax(0).tolist()
        self.sums.zero_()
        self.extremes.fill_(-torch.inf)
        named = dict(zip(self.names, sums, strict=True))
        tokens, steps = named.pop("tokens")
        drained = {name: total / count for name, (total, count) in named.items() if count}
        for name, value in zip(LARGEST + SMALLEST, extremes, strict=True):
            if value > -math.inf:
                drained[name] = value if name in LARGEST else -value
        return drained | ({"tokens_per_second": tokens / seconds} if steps and seconds > 0 else {})


def heldout_summary(names: Sequence[str]):
    """compute_metrics for evaluation: from one line per row (see GFTTrainer.prediction_step) to named means."""

    def summarise(prediction) -> dict[str, float]:
        lines = np.asarray(prediction.predictions, dtype=np.float64)
        log_prob, tokens, truncated, length, reward, *parts = lines.T
        summary = {"truncated": truncated.mean(), "completion_length": length.mean()}
        if tokens.sum() > 0:
            summary["expert_log_likelihood"] = log_prob.sum() / tokens.sum()
            summary["loss"] = -summary["expert_log_likelihood"]
        if names:
            summary["reward"] = reward.mean()
        if len(names) > 1:
            summary |= {f"reward_{name}": part.mean() for name, part in zip(names, parts, strict=True)}
        return {name: float(value) for name, value in summary.items()}

    return summarise


def completions_table(group: Group, step: int, width: int = 110) -> str:
    """One group as a table: where each response comes from, its reward, its advantage, its text."""
    prompt = group.row.prompt if isinstance(group.row.prompt, str) else group.row.prompt[-1]["content"]
    lines = [f"step {step} · {group.row.where} · {shorten(prompt, width)}"]
    lines.append(f"{'source':8} {'reward':>7} {'advantage':>9} {'tokens':>6}  text")
    for r in group.responses:
        text = shorten(r.text, width - 36)
        lines.append(f"{r.source:8} {r.reward:7.3f} {r.advantage:+9.3f} {len(r.ids):6}  {text}")
    return "\n".join(lines)


def shorten(text: str, width: int) -> str:
    return textwrap.shorten(text.replace("\n", " ⏎ "), width, placeholder=" …")


def append_completions(path: Path, groups: Sequence[Group], step: int) -> None:
    """One JSON line per response."""
    with path.open("a", encoding="utf-8") as lines:
        for g in groups:
            for r in g.responses:
                entry = {"step": step, "row": g.row.where, "source": r.source, "advantage": r.advantage}
                entry |= {"reward": r.reward if r.reward == r.reward else None, "prompt": g.row.prompt, "text": r.text}
                lines.write(json.dumps(entry, ensure_ascii=False) + "\n")
