"""The page of a study, made from its results alone: verdicts, tables, plots. The same results give the same bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.experiments import plots, settings, verdicts
from benchmarks.experiments.jobs import TUNING, chosen_rate, rate_scores
from benchmarks.experiments.measures import MEASURES
from benchmarks.experiments.methods import METHODS, label_of, stages
from benchmarks.experiments.results import USABLE, Results
from benchmarks.experiments.statistics import mean
from benchmarks.tables import markdown

HEADLINE = ("none", "sft", "sft-same", "sft-fast", "sft-mix", "sft-10x", "dft", "grpo", "grpo-4", "gft", "gft-positive",
            "gft-positive-same", "gft-given", "gft-bounded", "gft-split", "gft-no-mix", "luffy", "chord")  # fmt: skip
PIPELINES = ("sft>grpo", "sft-same>grpo", "sft-fast>grpo", "gft>grpo", "grpo>grpo", "sft>gft", "sft-same>gft",
             "sft-same>gft>grpo", "sft-fast>gft>grpo")  # fmt: skip
SWEEPS = {
    "Threshold τ": ("gft-tau-0", "gft-tau-0.1", "gft-tau-0.3", "gft-tau-0.5", "gft", "gft-tau-1"),
    "Composition of the group (given + sampled = 8; GFT has 4 given)": (
        "gft-0-8", "gft-no-mix", "gft-2-6", "gft", "gft-6-2", "gft-8-0"),
    "Normalisation of the advantage": ("gft", "gft-mean", "gft-leave-one-out"),
}  # fmt: skip
OUTCOME = ("pass1", "pass16", "distinct", "entropy", "kl", "retention", "expert")
DYNAMICS = ("grad_median", "grad_max", "spike", "zero_std", "rectified", "generated", "trained", "seconds")

INTRODUCTION = """# Experiments

Does GFT hold what it promises? A study with seeds, error bars and controls, on models small enough for two CPU cores,
trained by this project's own [trainer](training.md) and kernels. `make docs` writes this page from the results in
`benchmarks/results/experiments/`; no number is typed by hand. What to make of it in practice is in
[Choosing a method](choosing.md). Models of 0.1 M parameters say how methods behave, not how large models will score.

**How to read it.** *Mean ± standard error* over runs, a run being one base model and one seed; n is their number.
*Differences* are paired: the same base, the same seed, the same training and held-out prompts. Runs from one base share
its weights, so the base is the unit: each base's mean over its seeds is one observation, the interval is Student's at
95 % over them, and "80 % power from" says how large a true difference so many bases would have found. p is corrected by
Holm for all comparisons of its table, and it alone decides: a claim *held*, or *did not hold* and the opposite did,
where p is below 0.05; else it is *not shown*, which is no evidence of equality. Equality is a claim of its own, tested
within a stated margin by two one-sided tests. A base that solves less than 1 % before training has nothing that could
be reinforced: it is weak, counts in no mean, and the last column says what would have been found with it. Of the one
pretrained model of `smollm2` seeds and held-out prompts are the units, both drawn anew in a two-way bootstrap; what is
found there holds of that model and task. Its rates were first tried from 1e-5 to 1e-4; 3e-6 and 3e-4 were added after
its runs, by the rule that a method whose best rate moved was to be trained again. None moved.

The studies `digits` and `digits7` are exploratory: three bases taken for nine runs, claims without correction,
baselines tuned at the edges of their grids. With bases as units and corrected, none of their verdicts stands. They are
kept with the old reading beside the new; what they suggest is for registered studies to decide.
"""

LEARNING_RATES_TEXT = """pass@1 on the development split, {}; the chosen rate in
bold. A rate at the edge of the grid may not be the best there is.
"""

EXPLORATORY_TEXT = """Exploratory: the claims were written and changed beside the runs; they suggest and do not show.
*At first* is how the study was read before: runs as units, nothing corrected for.
"""

METHODS_TEXT = """## Methods

Every stage of every method is one `GFTTrainer` run that differs from the others in these options alone. GRPO is a
group of samples with C = 1: on-policy with one update per rollout, the clipped ratio is 1 throughout, so that this is
GRPO exactly. Samples are the rest of a group, whose size each study says. SFT is A = 1 and C = 1 on the expert's
demonstration; SFT (mix) on the expert's and three teachers', in `smollm2` on the expert's and one wrong answer, which
are all that its rows bring; a pipeline A → B trains B on from where A ended, so that
three stages have had more steps than two. The experts: `bracket` works in a form that the base has seen now and then,
`leap` adds two operands a step, which the base has never seen. Teachers use the base's own forms, 3 % of steps wrong.

| method | demonstrations | samples | options | learning rate |
|---|---:|---:|---|---|
"""


def write(studies: Sequence[Results], path: Path) -> Path:
    """The page at `path`, its plots in a folder of the page's name beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [INTRODUCTION, methods_table(studies), not_run(studies)]
    for results in studies:
        parts += study_section(results, path)
    path.write_text("\n\n".join(part.strip("\n") for part in parts) + "\n", encoding="utf-8")
    return path


def not_run(studies: Sequence[Results]) -> str:
    """The studies that are registered and have no results here."""
    found = {results.study.name for results in studies}
    names = [name for name in settings.names() if name not in found and settings.load(name).registered]
    listed = [f"- `{name}`: `benchmarks/experiments/studies/{name}.yaml` and its claims." for name in names]
    return "\n".join(["## Registered, without results yet\n", *listed]) + "\n" if names else ""


def methods_table(studies: Sequence[Results]) -> str:
    """The options of every method that the studies ran."""
    used = {stage for results in studies for r in results.records if r["kind"] == "run" for stage in stages(r["chain"])}
    lines = []
    for method in (method for name, method in METHODS.items() if name in used):
        shown = {**method.options}
        given, sampled = shown.pop("num_demonstrations", 0), shown.pop("num_generations", "the rest")
        rate = f"tuned as {METHODS[method.tuned_as].label}" if method.tuned_as else "the highest tried"
        if not method.trains:
            sampled, rate = 0, "–"
        options = ", ".join(f"`{key}` {value}" for key, value in shown.items())
        times = f"; {method.data} × prompts" if method.data > 1 else ""
        lines.append(f"| {method.label} | {given} | {sampled} | {options}{times} | {rate} |")
    return METHODS_TEXT + "\n".join(lines) + "\n"


def study_section(results: Results, path: Path) -> list[str]:
    """Every part of the page about one study."""
    experts = sorted({record["expert"] for record in results.records if record["expert"]})
    parts = [f"## Study: {results.study.name}", setting(results)]
    parts += ["### Claims", registration(results), verdicts.summary_table(results, experts)]
    parts += [part for e in experts for part in (f"Expert `{e}`:", verdicts.full_table(results, e))]
    parts += [verdicts.undecided(results)]
    for expert in experts:
        parts += [f"### Methods with the expert `{expert}`", table(results, expert, HEADLINE, OUTCOME, rates=True)]
        parts += ["While training:", table(results, expert, HEADLINE, DYNAMICS)]
        if any(results.of(chain, expert) for chain in PIPELINES):
            parts += [f"### Pipelines with the expert `{expert}`", table(results, expert, PIPELINES, OUTCOME)]
        for title, chains in SWEEPS.items():
            if sum(bool(results.of(chain, expert)) for chain in chains) > 1:
                parts += [
                    f"### {title}, expert `{expert}`",
                    table(results, expert, chains, (*OUTCOME[:6], *DYNAMICS[1:]), rates=True, shared=True),
                ]
    for expert in experts:
        if any(results.of(chain, expert, results.weak) for chain in (*HEADLINE, *PIPELINES)):
            parts += [f"### Weak bases, expert `{expert}`"]
            parts += [table(results, expert, (*HEADLINE, *PIPELINES), OUTCOME[:6], bases=results.weak)]
    parts += ["### Plots", *(f"![{title}]({name})\n" for title, name in plots.draw(results, experts, path))]
    return [*parts, *tuning_tables(results, experts)]


def setting(results: Results) -> str:
    """What was trained on what, by whom and how much of it is there."""
    study, source = results.study, results.source
    runs = [record for record in results.records if record["kind"] == "run"]
    done = f"{len(results.records)} of {len(results.planned)} jobs finished"
    tokens = [record["training"]["tokens"] for record in results.records if "tokens" in record.get("training", {})]
    millions = [sum(one[name] for one in tokens) / 1e6 for name in ("generated", "trained")]
    counted = "; {:.1f} million tokens generated and {:.1f} million trained on".format(*millions)
    seconds = [record["cpu_seconds"] for record in results.records if "cpu_seconds" in record]
    levels = ", ".join(f"{score:.3f} (base {base})" for base, score in sorted(results.usable.items()))
    apart = ", ".join(f"base {base} ({score:.3f})" for base, score in sorted(results.weak.items()))
    options = ", ".join(f"`{key}` {value}" for key, value in study.stage.items())
    made = f"fitted for {study.base['max_steps']} steps" if study.base else "pretrained, taken as they are"
    return "\n".join([
        f"- Task: {', '.join(f'`{key}` {value}' for key, value in study.task.items() if key != 'styles')}.",
        f"- Base models: {made}; pass@1 {levels}."
        + (f" Weak, below {USABLE:g}, left out of every mean and reported apart: {apart}." if apart else ""),
        f"- Groups of {study.group}. A first stage: {options}. A later stage: {study.follow_steps} steps.",
        f"- Evaluation: {study.evaluation.samples} samples at temperature 1 to each of {study.evaluation.prompts} "
        f"held-out prompts; retention on {study.evaluation.retention} prompts of the base's other tasks.",
        f"- {len(runs)} runs; {done}; {sum(seconds) / 60:.0f} minutes of processor time "
        f"for the {len(seconds)} whose time was counted{counted * bool(tokens)}.",
        f"- {source['machine']['cpu']}; torch {source['versions']['torch']}; "
        f"commit {source['commit']['revision'][:10]}{' with uncommitted changes' * source['commit']['dirty']}.",
        "",
    ])  # fmt: skip


def registration(results: Results) -> str:
    """Whether the claims stood before the runs, and where."""
    source = results.registered
    if source is None:
        return EXPLORATORY_TEXT
    file, commit = f"benchmarks/experiments/claims/{results.study.claims}.yaml", source["revision"][:10]
    return f"Registered: `{file}`, committed as {commit} on {source['date'][:10]}, before the first run.\n"


def table(results, expert: str, chains: Sequence[str], names, rates=False, shared=False, bases=None) -> str:
    """A line a chain that has runs, mean ± standard error of each measure.

    rates: show the learning rate. shared: only of the bases and seeds that every line has, so that lines compare.
    """
    found = [(chain, results.of(chain, expert, bases)) for chain in chains]
    shown = [(chain, records) for chain, records in found if records]
    if shared:
        common = set.intersection(*({(r["base"], r["seed"]) for r in records} for _, records in shown))
        shown = [(chain, [r for r in records if (r["base"], r["seed"]) in common]) for chain, records in shown]
    measures = [MEASURES[name] for name in names]
    head = ["method", "n", *(["rate"] if rates else []), *(measure.title for measure in measures)]
    lines = []
    for chain, records in shown:
        cells = [label_of(chain), str(len(records)), *([f"{records[0]['rate']:g}"] if rates else [])]
        lines.append([*cells, *(cell(measure, records) for measure in measures)])
    return markdown(head, lines, "lr")


def cell(measure, records) -> str:
    found = mean([measure.of(record) for record in records])
    error = "" if math.isnan(found.error) else f" ± {measure.show(found.error)}"
    return measure.show(found.value) + error


def tuned_on(tuning: settings.Tuning) -> str:
    """What a study's rates were tried on, beside its runs."""
    if len(tuning.bases) > 1:
        return f"the mean over {len(tuning.bases)} base models kept for this"
    return f"{tuning.prompts} prompts and {len(tuning.seeds)} seed kept for this"


def tuning_tables(results: Results, experts: Sequence[str]) -> list[str]:
    """Development pass@1 of every rate that was tried, of chains whose every rate was; the chosen one in bold."""
    tuning = results.study.tuning
    records = [record for record in results.records if record["kind"] == TUNING]
    if tuning is None or not records:
        return []
    parts, rates = ["### Learning rates", LEARNING_RATES_TEXT.format(tuned_on(tuning))], list(map(float, tuning.rates))
    for expert in experts:
        lines = []
        for chain in tuning.methods:
            scores = rate_scores(records, chain, expert)
            if set(scores) == set(rates):
                best = chosen_rate(records, chain, expert)
                cells = [f"**{scores[r]:.3f}**" if r == best else f"{scores[r]:.3f}" for r in rates]
                edge = " (edge)" if best in (rates[0], rates[-1]) else ""
                lines.append([label_of(chain) + edge, *cells])
        parts.append(markdown([f"expert `{expert}`", *(f"{rate:g}" for rate in rates)], lines, "lr"))
    return parts
