"""benchmarks/experiments: what is sampled, scored, planned and compared, before any study is believed."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import numpy
import pytest
import torch

from benchmarks.experiments import jobs, settings, statistics
from benchmarks.experiments.evaluation import pass_at, sample_groups
from benchmarks.experiments.methods import METHODS
from benchmarks.experiments.rollouts import sample_gpt2
from benchmarks.experiments.scoring import demonstration, entropy_and_kl, log_probs
from benchmarks.experiments.statistics import OverDraws, OverUnits, holm, mean, over_seeds_and_prompts, p_value, paired
from benchmarks.experiments.training import Stage, train
from benchmarks.experiments.work import KINDS
from gft_kernels.data import digit_sum
from gft_kernels.trainer import GFTConfig, Sampling, generate

DIGITS = {"digits": 5, "styles": {"left": 1.0}, "base_count": 8, "rows": 16, "width": 32, "layers": 2, "heads": 2}


@pytest.fixture(scope="module")
def task():
    return KINDS["digit-sum"](**DIGITS)


def rough(task, seed=0, factor=4.0):
    """A model whose distributions are far from uniform."""
    model = task.new_model(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model.eval()


# --- the tasks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expert", ["bracket", "leap"])
@pytest.mark.parametrize("digits", [5, 6, 7])
def test_experts_and_noiseless_teachers_are_right(expert, digits):
    rows = digit_sum.records(40, 0.0, seed=3, expert=expert, teachers=5, digits=digits)
    for row in rows:
        assert len(row["demonstrations"]) == 6
        assert digit_sum.strict([row["prompt"]] * 6, row["demonstrations"]) == [1.0] * 6


def test_the_leap_adds_two_digits_a_step_and_is_checked_step_by_step():
    digits = [1, 2, 3, 4, 9]
    assert digit_sum.solution(digits, "leap") == "[9+4+3]6,[6+2+1]9,#9."
    wrong = ("[9+4+3]5,[5+2+1]8,#8.", "[9+4+3]6,[6+2]8,#8.", "[9+4+3]6,[5+2+1]8,#8.", "[9+4+3]6,[6+2+1]9,#8.")
    assert digit_sum.strict([digit_sum.prompt_of(digits)] * len(wrong), wrong) == [0.0] * len(wrong)


# --- sampling and scoring ---------------------------------------------------------------------------------------------


def test_samples_are_read_as_training_reads_them(task):
    """A token that is no part of any answer stays visible: it must not make a wrong sample right."""
    pad, eos = task.tokenizer.pad_token, task.tokenizer.eos_token
    [row] = task.held_out(0, 1, "bracket")
    said = row["demonstrations"][0]
    spellings = [f"{said}{eos}", f"{said[:2]}{pad}{said[2:]}{eos}", said]
    ids = [task.tokenizer(spelling)["input_ids"] for spelling in spellings]
    told = dataclasses.replace(task, rollout=lambda model, prompts, sampling: ids)
    [group] = sample_groups(task.new_model(0), told, [row], 3, 40, seed=0)
    assert [r.text for r in group.responses] == [said, f"{said[:2]}{pad}{said[2:]}", said]
    assert [r.reward for r in group.responses] == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_the_lean_loop_draws_what_generate_draws(task, temperature):
    """Both take one multinomial draw a token from the same stream, so that the samples agree token by token."""
    model = rough(task)
    prompts = [task.tokenizer(row["prompt"])["input_ids"] for row in task.train_rows("leap", 0, 1)]
    sampling = Sampling(3, 20, temperature, (task.tokenizer.eos_token_id, 9), task.tokenizer.pad_token_id)
    drawn = []
    for sample in (generate, sample_gpt2):
        torch.manual_seed(5)
        drawn.append(sample(model, prompts, sampling))
    assert drawn[0] == drawn[1]
    assert len({len(ids) for ids in drawn[1]}) > 1, "some must end early, or the end is not tested"


def test_the_lean_loop_refuses_prompts_of_different_lengths(task):
    with pytest.raises(ValueError, match="same length"):
        sample_gpt2(rough(task), [[2, 3], [2]], Sampling(1, 4, 1.0, (1,), 0))


def test_pass_at_k_is_the_chance_that_k_drawn_samples_hold_a_right_one():
    for right, k in itertools.product(range(6), range(1, 6)):
        draws = list(itertools.combinations([i < right for i in range(5)], k))
        assert pass_at(k, 5, right) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_entropy_kl_and_log_likelihood_of_known_tokens(task):
    model, other = rough(task), rough(task, seed=1)
    groups = [demonstration(task.tokenizer, row, number) for row in task.train_rows("leap", 0, 1) for number in (0, 1)]
    entropy, kl = entropy_and_kl(model, other, groups)
    totals, found = torch.zeros(2).double(), []
    for group in groups:  # one text at a time, without padding, in double precision
        prompt, ids = group.row.prompt_ids, group.responses[0].ids
        with torch.no_grad():
            p, q = (m(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double() for m in (model, other))
        p, q = torch.log_softmax(p, -1), torch.log_softmax(q, -1)
        totals += torch.stack([-(p.exp() * p).sum(), (p.exp() * (p - q)).sum()])
        found += p[range(len(ids)), ids].tolist()
    assert (entropy, kl) == pytest.approx((totals / len(found)).tolist(), rel=1e-4)
    assert log_probs(model, groups).tolist() == pytest.approx(found, rel=1e-4, abs=1e-5)
    assert kl > 0.01 and entropy_and_kl(model, model, groups)[1] == 0.0


# --- the same curve by the kernels and by the reference ---------------------------------------------------------------


@pytest.mark.parametrize("method", ["sft", "gft"])
def test_kernels_and_reference_give_the_same_training_curve(task, method):
    """float32, one seed, samples drawn anew each step: a wrong gradient would change the samples after it as well."""

    def curve(backend):
        options = {"max_steps": 8, "per_device_train_batch_size": 4, "max_completion_length": 34, "learning_rate": 1e-3}
        options |= {"logging_steps": 1, "backend": backend, "num_generations": 4, **METHODS[method].options}
        stage = Stage(options, task.train_rows("leap", 0, 1), None, 0, "cpu")
        history, tokens = train(rough(task, factor=2.0), task, stage)
        assert (tokens["generated"] > 0) == (method == "gft") and tokens["trained"] > tokens["generated"]
        return [[line["loss"], line["grad_norm"], line["entropy"], line["pi"]] for line in history if "loss" in line]

    kernels, reference = torch.tensor(curve("cpu")), torch.tensor(curve("reference"))
    torch.testing.assert_close(kernels, reference, rtol=2e-4, atol=2e-5)
    assert (reference[0] - reference[-1]).abs().max() > 0.01, "the curve must move"


# --- statistics -------------------------------------------------------------------------------------------------------


def run(base, seed, value):
    return {"base": base, "seed": seed, "value": value}


def test_mean_and_standard_error():
    found = mean([1.0, 2.0, 4.0, 5.0])
    assert (found.value, found.error, found.n) == (3.0, pytest.approx(0.9128709), 4)
    assert mean([2.0]).error != mean([2.0]).error and mean([]).n == 0


def test_a_base_is_one_observation_however_many_seeds_it_has():
    others = [run(0, 0, 1.0), run(0, 1, 5.0), run(1, 0, 2.0), run(1, 1, 0.0), run(2, 0, 3.0)]
    ours = [run(1, 1, 1.5), run(0, 1, 6.0), run(0, 0, 3.0), run(1, 0, 1.5), run(2, 0, 7.0), run(9, 9, 99.0)]
    random.Random(0).shuffle(others)
    found = paired(ours, others, lambda record: record["value"])  # differences 2, 1 | -0.5, 1.5 | 4: bases 1.5, 0.5, 4
    assert (found.value, found.units, found.pairs) == (pytest.approx(2.0), 3, 5)
    error = 1.0408330
    assert found.interval() == (pytest.approx(2.0 - 4.302653 * error), pytest.approx(2.0 + 4.302653 * error))
    assert found.detectable() == pytest.approx((4.302653 + 1.060660) * error, rel=1e-6)
    as_runs = paired(ours, others, lambda record: record["value"], runs=True)
    assert (as_runs.value, as_runs.units) == (pytest.approx(1.6), 5)


def test_two_way_bootstrap_keeps_the_pairs_and_knows_both_sources_of_chance():
    """Differences that are seed effects plus prompt effects: the variance of their mean is the sum of the two."""
    seeds, prompts = [0.3, -0.1, 0.2, 0.4, 0.2], [0.5, -0.5, 0.1, 0.3, -0.2, 0.4, 0.0, 0.2]
    ours = [{"base": 0, "seed": s, "each": [e + p for p in prompts]} for s, e in enumerate(seeds)]
    others = [{"base": 0, "seed": s, "each": [0.0] * len(prompts)} for s in reversed(range(len(seeds)))]
    found = over_seeds_and_prompts(ours, others, lambda record: record["each"])
    truth = torch.tensor(seeds).var(correction=0) / 5 + torch.tensor(prompts).var(correction=0) / 8
    assert found.value == pytest.approx(0.3) and (found.units, found.pairs) == (5, 5)
    assert found.draws.std() == pytest.approx(float(truth.sqrt()), rel=0.03)
    low, high = found.interval()
    assert low < 0.1 < 0.5 < high
    same = over_seeds_and_prompts(ours, ours, lambda record: record["each"])
    assert math.isnan(p_value(same, "more", 0.0)) and math.isnan(p_value(same, "equal", 0.1))
    tied = OverDraws(0.1, 5, 5, numpy.array([0.0] * 60 + [0.25] * 40))
    assert p_value(tied, "more", 0.0) == 1.0 and p_value(tied, "not-inferior", 0.2) == pytest.approx(2 / 101)
    with pytest.raises(ValueError, match="two seeds"):
        over_seeds_and_prompts(ours[:1], others, lambda record: record["each"])


@pytest.mark.parametrize(
    "value, expect, margin, said",
    [(0.3, "more", 0.0, "held"), (-0.3, "more", 0.0, "did not hold: the opposite"), (0.1, "more", 0.0, "not shown"),
     (-0.3, "less", 0.0, "held"), (-0.05, "not-inferior", 0.25, "held"), (-0.05, "not-inferior", 0.1, "not shown"),
     (-0.5, "not-inferior", 0.1, "did not hold: the opposite"), (0.02, "equal", 0.2, "held"),
     (0.02, "equal", 0.1, "not shown"), (0.5, "equal", 0.2, "not shown")],
)  # fmt: skip
def test_verdicts(value, expect, margin, said):
    found = OverUnits(value, 8, 16, 0.07)  # the 97.5 % quantile of t with 7 degrees of freedom is 2.365
    assert statistics.verdict(found, expect, margin, p_value(found, expect, margin)) == said


def test_without_a_second_base_or_any_spread_nothing_is_said():
    for found in (OverUnits(0.3, 1, 2, math.nan), OverUnits(0.3, 3, 3, 0.0)):
        assert statistics.verdict(found, "more", 0.0, p_value(found, "more", 0.0)) == "not testable here"


def test_holm_steps_down_and_leaves_out_what_was_not_tested():
    assert holm([0.04, math.nan, 0.01, 0.03]) == pytest.approx([0.06, math.nan, 0.03, 0.06], nan_ok=True)
    assert holm([0.9, 0.8]) == [1.0, 1.0]


# --- studies and their plans ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", settings.names())
def test_a_study_plans_each_job_once_after_what_it_needs_by_the_trainers_options(name):
    study = settings.load(name)
    planned = jobs.plan(study)
    names = [job.name for job in planned]
    assert len(set(names)) == len(names)
    for number, job in enumerate(planned):
        assert set(job.needs) <= set(names[:number])
        if job.before:
            assert any(need.startswith(f"run_{job.before.replace('>', '--')}_") for need in job.needs)
    used = {*study.base, *study.stage, *(key for method in METHODS.values() for key in method.options)}
    assert used <= {field.name for field in dataclasses.fields(GFTConfig)}


@pytest.mark.parametrize(
    "change, message",
    [({"nonsense": 1}, "nonsense"), ({"follow_steps": None}, "follow_steps"), ({"rates": {}}, "rates"),
     ({"grid": [{"chains": ["gft>sfd"], "experts": ["leap"], "bases": [0], "seeds": [0]}]}, "sfd"),
     ({"grid": [{"chains": ["gft-no-mix"], "experts": ["leap"], "bases": [0], "seeds": [0]}]}, "gft-no-mix")],
)  # fmt: skip
def test_a_study_that_cannot_run_is_refused_by_name(change, message):
    values = settings.load("quick").as_dict() | change
    with pytest.raises(ValueError, match=message):
        settings.from_dict({key: value for key, value in values.items() if value is not None})


def test_settings_are_changed_by_key():
    study = settings.load("bases", ["stage.max_steps=3", "name=other", "evaluation.samples=2"])
    assert (study.name, study.stage["max_steps"], study.evaluation.samples) == ("other", 3, 2)
    assert study.stage["warmup_steps"] == settings.load("bases").stage["warmup_steps"]
    for wrong in ("stage.max_steps", "nothing.max_steps=3", "name.first=x"):
        with pytest.raises(ValueError, match="--set must be KEY=VALUE"):
            settings.load("bases", [wrong])
    with pytest.raises(ValueError, match="nonsense"):
        settings.load("bases", ["nonsense=3"])


def test_the_chosen_rate_is_the_best_on_the_development_split_and_of_equals_the_smallest():
    def tried(rate, score, expert="leap", chain="sft"):
        return {"kind": "tuning", "chain": chain, "expert": expert, "rate": rate, "metrics": {"pass_at": {"1": score}}}

    records = [tried(1e-3, 0.5), tried(1e-4, 0.5), tried(1e-2, 0.1)]
    records += [tried(1e-2, 0.9, "bracket"), tried(1.0, 1.0, chain="dft")]
    assert jobs.chosen_rate(records, "sft", "leap") == 1e-4
    assert jobs.chosen_rate(records, "sft", "bracket") == 1e-2
    with pytest.raises(ValueError, match="gft"):
        jobs.chosen_rate(records, "gft", "leap")
