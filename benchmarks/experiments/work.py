"""Does one job: fits a base model, or trains one stage of a method and evaluates it."""

from __future__ import annotations

import functools
import json
import time
from dataclasses import replace

import torch

from benchmarks import provenance
from benchmarks.experiments import jobs, tasks
from benchmarks.experiments.evaluation import evaluate
from benchmarks.experiments.jobs import Folder, Job
from benchmarks.experiments.methods import METHODS
from benchmarks.experiments.settings import Study
from benchmarks.experiments.training import Stage, rounded, summary, train

FIT = {"advantages": "ones", "tau": 0.0, "num_demonstrations": 1, "num_generations": 0, "token_metrics": False}
KINDS = {"digit-sum": tasks.DigitSums, "gsm8k": tasks.WordProblems, "extraction": tasks.Extraction}


def do(study: Study, folder: Folder, job: Job, device: str) -> None:
    """Leaves the job's model and, last, its result in the folder."""
    start, cpu_start = time.perf_counter(), time.process_time()
    task = make_task(json.dumps(study.task))
    base = None if job.kind == jobs.BASE else load(task, folder, Job(jobs.BASE, job.base).name, device)
    training = None
    if base is None:
        model = base = fit_base(study, task, job, device)
        rate = study.base.get("learning_rate", 0.0)
    elif not METHODS[job.method].trains:
        model, rate = base, 0.0
    else:
        rate, before = rate_of(study, folder, job), Job(jobs.BASE, job.base)
        if job.before:
            before = Job(jobs.RUN, job.base, job.before, study.expert_of(job.before, job.expert), job.seed)
        model = load(task, folder, before.name, device)
        training = summary(*train(model, task, stage_of(study, task, job, rate, device)))
    purpose = tasks.DEVELOPMENT if job.kind == jobs.TUNING else tasks.TEST
    metrics = score(study, task, model.eval(), base, job, purpose)
    starts_others = any(job.name in other.needs for other in jobs.plan(study))
    if starts_others and job.kind != jobs.TUNING:  # of tuning they need the score alone
        folder.model(job.name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), folder.model(job.name))
    identity = {"kind": job.kind, "chain": job.chain, "expert": job.expert, "base": job.base, "seed": job.seed}
    spent = {"seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(time.process_time() - cpu_start, 1)}
    record = {**identity, "rate": rate, "metrics": metrics, **spent, "commit": provenance.commit()}
    folder.write(job.name, record | ({"training": training} if training else {}))


@functools.lru_cache(1)
def make_task(settings: str):
    """settings: as JSON, so that the jobs of a worker share a task."""
    values = json.loads(settings)
    return KINDS[values.pop("name")](**values)


def fit_base(study: Study, task, job: Job, device: str):
    """A model of the task's own, fitted as the study says; a pretrained one is taken as it is."""
    model = task.new_model(job.base).to(device)
    if not study.base:
        return model
    options = {**FIT, "logging_steps": 1, **study.base}
    train(model, task, Stage(options, task.base_rows(job.base), None, job.base, device))
    return model


def load(task, folder: Folder, name: str, device: str):
    model = task.new_model(0)
    model.load_state_dict(torch.load(folder.model(name), weights_only=True))
    return model.to(device).eval()


def rate_of(study: Study, folder: Folder, job: Job) -> float:
    """The learning rate of a job: under trial, fixed by the study, or the tuned one of its method."""
    if job.rate is not None:
        return job.rate
    tuned = study.tuned_as(job.chain)
    if study.tuning is None:
        return study.rates[tuned or job.method]
    if tuned is None:
        return max(map(float, study.tuning.rates))
    records = [folder.read(name) for name in job.needs if name.startswith(jobs.TUNING)]
    return jobs.chosen_rate(records, tuned, job.expert)


def stage_of(study: Study, task, job: Job, rate: float, device: str) -> Stage:
    method = METHODS[job.method]
    options = {"logging_steps": 1, **study.stage, **method.options, "learning_rate": rate}
    options["per_device_train_batch_size"] *= method.data
    given = options["num_demonstrations"] = min(options["num_demonstrations"], task.demonstrations)
    options.setdefault("num_generations", study.group - given)
    if job.before:
        options["max_steps"] = study.follow_steps
    expert = job.expert or study.grid[0].experts[0]  # rows need demonstrations even where none is read
    rows = task.train_rows(expert, job.seed, method.data)
    shown = study.evaluation.curve if job.kind == jobs.RUN else 0
    curve = task.held_out(tasks.CURVE, shown, expert) if shown else None
    return Stage(options, rows, curve, job.seed, device)


def score(study: Study, task, model, base, job: Job, purpose: int) -> dict:
    settings = study.evaluation
    if job.kind == jobs.TUNING:  # what is right decides
        settings = replace(settings, prompts=study.tuning.prompts or settings.prompts, scored=0, retention=0)
    rows = task.held_out(purpose, settings.prompts, job.expert or study.grid[0].experts[0])
    longest = study.stage["max_completion_length"]
    found = evaluate(model, base, task, rows, settings, longest, tasks.stream(purpose, job.seed))
    if settings.retention:
        found["retention"] = task.retention(model, settings.retention)
    if job.kind != jobs.RUN:
        found = {name: value for name, value in found.items() if not isinstance(value, list)}
    return rounded(found)
