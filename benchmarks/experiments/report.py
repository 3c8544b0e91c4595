"""The page of a study, made from its results alone: verdicts, tables, plots. The same results give the same bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.experiments import claims, plots
from benchmarks.experiments.claims import CLAIMS
from benchmarks.experiments.jobs import TUNING, chosen_rate
from benchmarks.experiments.measures import MEASURES
from benchmarks.experiments.methods import METHODS, label_of, stages
from benchmarks.experiments.results import Results
from benchmarks.experiments.statistics import mean

HEADLINE = ("sft", "sft-same", "sft-fast", "sft-mix", "sft-10x", "dft", "grpo", "gft", "gft-positive", "gft-no-mix")
PIPELINES = ("sft>grpo", "sft-same>grpo", "sft-fast>grpo", "gft>grpo", "grpo>grpo", "sft>gft", "sft-same>gft",
             "sft-same>gft>grpo", "sft-fast>gft>grpo")  # fmt: skip
SWEEPS = {
    "Threshold τ": ("gft-tau-0", "gft-tau-0.1", "gft-tau-0.3", "gft-tau-0.5", "gft", "gft-tau-1"),
    "Composition of the group (given + sampled = 8; GFT has 4 given)": (
        "gft-0-8", "gft-no-mix", "gft-2-6", "gft", "gft-6-2", "gft-8-0"),
    "Normalisation of the advantage": ("gft", "gft-mean", "gft-leave-one-out"),
}  # fmt: skip
OUTCOME = ("pass1", "pass16", "distinct", "entropy", "kl", "retention", "expert")
DYNAMICS = ("grad_median", "grad_max", "zero_std", "rectified")

INTRODUCTION = """# Experiments

Does GFT hold what it promises? A study with seeds, error bars and controls, on models small enough for two CPU cores,
trained by this project's own [trainer](training.md) and kernels. `make docs` writes this page from the results in
`benchmarks/results/experiments/`; no number is typed by hand. What to make of it in practice is in
[Choosing a method](choosing.md). Models of 0.1 M parameters say how methods behave, not how large models will score.

**How to read it.** *Mean ± standard error* over runs, a run being one base model and one seed; n is their number.
*Differences* are paired: the same base, the same seed, the same training and held-out prompts; the interval is
Student's at 95 % over the pairs, and the column "bases" counts those whose own mean has the sign of the whole. Runs
from the same base are not fully independent, so an interval that only just leaves out 0 deserves little trust. Many
comparisons are made and none is corrected for. A claim *held* when the whole interval lies on its side of 0; it *did
not hold* when it lies on the other, and is *not shown* when the interval holds 0, for which with n = 3 a want of runs
may be the reason.
"""

METHODS_TEXT = """## Methods

Every stage of every method is one `GFTTrainer` run that differs from the others in these options alone. GRPO is a
group of samples with C = 1: on-policy with one update per rollout, the clipped ratio is 1 throughout, so that this is
GRPO exactly. SFT is A = 1 and C = 1 on the expert's demonstration; SFT (mix) on the expert's and three teachers'; a
pipeline A → B trains B on from where A ended, so that three stages have had more steps than two. The experts:
`bracket` works in a form that the base has seen now and then, `leap` adds two operands a step, which the base has
never seen. Teachers use the base's own forms, 3 % of steps wrong.

| method | demonstrations | samples | options | learning rate |
|---|---:|---:|---|---|
"""


def write(studies: Sequence[Results], path: Path) -> Path:
    """The page at `path`, its plots in a folder of the page's name beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [INTRODUCTION, methods_table(studies)]
    for results in studies:
        parts += study_section(results, path)
    path.write_text("\n\n".join(part.strip("\n") for part in parts) + "\n", encoding="utf-8")
    return path


def methods_table(studies: Sequence[Results]) -> str:
    """The options of every method that the studies ran."""
    used = {stage for results in studies for r in results.records if r["kind"] == "run" for stage in stages(r["chain"])}
    lines = []
    for name in (name for name in METHODS if name in used):
        method = METHODS[name]
        shown = {**method.options}
        given, sampled = shown.pop("num_demonstrations"), shown.pop("num_generations")
        rate = f"tuned as {METHODS[method.tuned_as].label}" if method.tuned_as else "the highest tried"
        options = ", ".join(f"`{key}` {value}" for key, value in shown.items())
        times = f"; {method.data} × prompts" if method.data > 1 else ""
        lines.append(f"| {method.label} | {given} | {sampled} | {options}{times} | {rate} |")
    return METHODS_TEXT + "\n".join(lines) + "\n"


def study_section(results: Results, path: Path) -> list[str]:
    """Every part of the page about one study."""
    experts = sorted({record["expert"] for record in results.records if record["expert"]})
    parts = [f"## Study: {results.study.name}", setting(results)]
    parts += ["### Claims", verdicts_table(results, experts), *claims_tables(results, experts)]
    for expert in experts:
        parts += [f"### Methods with the expert `{expert}`", table(results, expert, HEADLINE, OUTCOME, rates=True)]
        parts += ["While training:", table(results, expert, HEADLINE, DYNAMICS)]
        parts += [f"### Pipelines with the expert `{expert}`", table(results, expert, PIPELINES, OUTCOME)]
        for title, chains in SWEEPS.items():
            if sum(bool(results.of(chain, expert)) for chain in chains) > 1:
                parts += [
                    f"### {title}, expert `{expert}`",
                    table(results, expert, chains, (*OUTCOME[:6], *DYNAMICS[1:]), rates=True, shared=True),
                ]
    for expert in experts:
        if any(results.of(chain, expert, able=False) for chain in (*HEADLINE, *PIPELINES)):
            parts += [f"### A base that cannot solve the task, expert `{expert}`"]
            parts += [table(results, expert, (*HEADLINE, *PIPELINES), OUTCOME[:6], able=False)]
    parts += ["### Plots", *(f"![{title}]({name})\n" for title, name in plots.draw(results, experts, path))]
    return [*parts, *tuning_tables(results, experts)]


def setting(results: Results) -> str:
    """What was trained on what, by whom and how much of it is there."""
    study, source = results.study, results.source
    runs = [record for record in results.records if record["kind"] == "run"]
    unable = results.bases(able=False)
    done = f"{len(results.records)} of {len(results.planned)} jobs finished"
    seconds = [record["cpu_seconds"] for record in results.records if "cpu_seconds" in record]
    levels = ", ".join(f"{score:.3f} (base {base})" for base, score in sorted(results.bases().items()))
    apart = ", ".join(f"base {base} ({score:.3f})" for base, score in sorted(unable.items()))
    options = ", ".join(f"`{key}` {value}" for key, value in study.stage.items())
    return "\n".join([
        f"- Task: {', '.join(f'`{key}` {value}' for key, value in study.task.items() if key != 'styles')}.",
        f"- Base models: fitted for {study.base['max_steps']} steps; pass@1 {levels}."
        + (f" Below {study.least_base:g}, left out of every mean and reported apart: {apart}." if apart else ""),
        f"- A first stage: {options}. A later stage: {study.follow_steps} steps.",
        f"- Evaluation: {study.evaluation.samples} samples at temperature 1 to each of {study.evaluation.prompts} "
        f"held-out prompts; retention on {study.evaluation.retention} prompts of the base's other tasks.",
        f"- {len(runs)} runs; {done}; {sum(seconds) / 60:.0f} minutes of processor time "
        f"for the {len(seconds)} whose time was counted.",
        f"- {source['machine']['cpu']}; torch {source['versions']['torch']}; "
        f"commit {source['commit']['revision'][:10]}{' with uncommitted changes' * source['commit']['dirty']}.",
        "",
    ])  # fmt: skip


def verdicts_table(results: Results, experts: Sequence[str]) -> str:
    """A line a claim, a column an expert: the verdicts of its comparisons."""
    lines = [
        "| claim | origin | " + " | ".join(f"`{expert}`" for expert in experts) + " |",
        "|---|---|" + "---|" * len(experts),
    ]
    for claim in CLAIMS:
        said = [short_verdict(results, claim, expert) for expert in experts]
        lines.append(f"| {claim.text} | {claim.origin} | " + " | ".join(said) + " |")
    return "\n".join(lines) + "\n"


def short_verdict(results: Results, claim: claims.Claim, expert: str) -> str:
    """One word for all comparisons of a claim, or how many of them held."""
    found = [claims.verdict(claims.difference(results, c, expert), c.sign) for c in claim.comparisons]
    decided = [said for said in found if said != claims.NOT_TESTABLE]
    if not decided:
        return claims.NOT_TESTABLE
    if len(set(decided)) == 1:
        return emphasised(decided[0])
    return "; ".join(f"{said} in {decided.count(said)} of {len(decided)}" for said in dict.fromkeys(decided))


def emphasised(said: str) -> str:
    return f"**{said}**" if said in (claims.HELD, claims.OPPOSITE) else said


def claims_tables(results: Results, experts: Sequence[str]) -> list[str]:
    """A table an expert; claims without a comparison stand once, at the end."""
    parts = []
    for expert in experts:
        head = "| claim | origin | compared | difference [95 % interval] | n | bases | verdict |"
        lines = [f"Expert `{expert}`:\n", head, "|---|---|---|---|---:|---:|---|"]
        for claim in CLAIMS:
            for comparison in claim.comparisons:
                lines.append(claim_line(results, expert, claim, comparison))
        parts.append("\n".join(lines) + "\n")
    lines = ["Not decided by runs of this study:\n"]
    lines += [f"- *{claim.text}* ({claim.origin}): {claim.why_not}." for claim in CLAIMS if claim.why_not]
    return [*parts, "\n".join(lines) + "\n"]


def claim_line(results, expert, claim, comparison) -> str:
    found, measure = claims.difference(results, comparison, expert), MEASURES[comparison.measure]
    compared = f"{measure.title}: {label_of(comparison.better)} against {label_of(comparison.other)}"
    said = claims.verdict(found, comparison.sign)
    if found.n == 0:
        return f"| {claim.text} | {claim.origin} | {compared} | – | 0 | – | {said} |"
    interval = "" if math.isnan(found.low) else f" [{found.low:+.3f}, {found.high:+.3f}]"
    return (
        f"| {claim.text} | {claim.origin} | {compared} | {found.value:+.3f}{interval} | {found.n} | "
        f"{found.agreeing}/{found.bases} | {emphasised(said)} |"
    )


def table(results, expert: str, chains: Sequence[str], names, rates=False, shared=False, able=True) -> str:
    """A line a chain that has runs, mean ± standard error of each measure.

    rates: show the learning rate. shared: only of the bases and seeds that every line has, so that lines compare.
    """
    found = [(chain, results.of(chain, expert, able)) for chain in chains]
    shown = [(chain, records) for chain, records in found if records]
    if shared:
        common = set.intersection(*({(r["base"], r["seed"]) for r in records} for _, records in shown))
        shown = [(chain, [r for r in records if (r["base"], r["seed"]) in common]) for chain, records in shown]
    measures = [MEASURES[name] for name in names]
    head = ["method", "n", *(["rate"] if rates else []), *(measure.title for measure in measures)]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for chain, records in shown:
        cells = [label_of(chain), str(len(records)), *([f"{records[0]['rate']:g}"] if rates else [])]
        lines.append("| " + " | ".join([*cells, *(cell(measure, records) for measure in measures)]) + " |")
    return "\n".join(lines) + "\n"


def cell(measure, records) -> str:
    found = mean([measure.of(record) for record in records])
    error = "" if math.isnan(found.error) else f" ± {measure.show(found.error)}"
    return measure.show(found.value) + error


def tuning_tables(results: Results, experts: Sequence[str]) -> list[str]:
    """Development pass@1 of every rate that was tried; the chosen one in bold."""
    tuning = results.study.tuning
    records = [record for record in results.records if record["kind"] == TUNING]
    if tuning is None or not records:
        return []
    parts = [
        "### Learning rates",
        "pass@1 on the development split, on a base model of its own; the chosen rate in bold. A rate at the edge of "
        "the grid may not be the best there is.\n",
    ]
    for expert in experts:
        rates = [float(rate) for rate in tuning.rates]
        lines = [f"| expert `{expert}` | " + " | ".join(f"{rate:g}" for rate in rates) + " |"]
        lines.append("|---|" + "---:|" * len(rates))
        for name in tuning.methods:
            found = {r["rate"]: r for r in records if r["chain"] == name and r["expert"] in (None, expert)}
            if len(found) == len(rates):
                best = chosen_rate(records, name, expert)
                cells = [f"{found[rate]['metrics']['pass_at']['1']:.3f}" for rate in rates]
                cells = [f"**{c}**" if rate == best else c for c, rate in zip(cells, rates, strict=True)]
                lines.append(f"| {METHODS[name].label} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines) + "\n")
    return parts
