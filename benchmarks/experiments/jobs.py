"""What a study consists of: jobs, each with a result file of its own and the jobs whose results it needs."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.experiments.methods import THEN, stages
from benchmarks.experiments.settings import Study

BASE, TUNING, RUN = "base", "tuning", "run"


@dataclass(frozen=True)
class Job:
    """One fitting or training. `chain` is the pipeline up to and with its last stage, which is what this job trains.

    rate: given while tuning; in a run it is looked up among the tuned ones.
    """

    kind: str
    base: int
    chain: str = ""
    expert: str | None = None
    seed: int = 0
    rate: float | None = None
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Unique in the study; a file name."""
        parts = [self.kind, self.chain.replace(THEN, "--"), self.expert or "", f"b{self.base}"]
        if self.kind != BASE:
            parts.append(f"s{self.seed}")
        if self.rate is not None:
            parts.append(f"{self.rate:g}")
        return "_".join(part for part in parts if part)

    @property
    def method(self) -> str:
        return stages(self.chain)[-1] if self.chain else ""

    @property
    def before(self) -> str | None:
        """The chain of the stage this one starts from; None where it starts from the base model."""
        return self.chain.rpartition(THEN)[0] or None


def plan(study: Study) -> list[Job]:
    """Every job once, in the order of the file: bases and tuning first, then the grid cell by cell."""
    jobs: dict[str, Job] = {}

    def add(job: Job) -> Job:
        return jobs.setdefault(job.name, job)

    tuning: list[Job] = []
    for job in _tuning(study):
        needs = [add(Job(BASE, job.base)).name]
        if job.before:
            needs.append(_add_chain(study, add, tuning, job.before, job.expert, job.base, job.seed))
        tuning.append(add(replace(job, needs=tuple(needs))))
    for cells in study.grid:
        for base in cells.bases:
            add(Job(BASE, base))
        for seed, base, expert, chain in itertools.product(cells.seeds, cells.bases, cells.experts, cells.chains):
            _add_chain(study, add, tuning, chain, expert, base, seed)
    return list(jobs.values())


def _tuning(study: Study) -> list[Job]:
    if study.tuning is None:
        return []
    t, methods = study.tuning, sorted(study.tuning.methods, key=lambda chain: len(stages(chain)))
    return [
        Job(TUNING, base, chain, study.expert_of(chain, expert), seed, float(rate))
        for chain, seed, base, expert, rate in itertools.product(methods, t.seeds, t.bases, t.experts, t.rates)
    ]


def _add_chain(study, add, tuning, chain, expert, base, seed) -> str:
    """Adds the jobs of a chain's stages and returns the last one's name."""
    names = stages(chain)
    needs: tuple[str, ...] = (Job(BASE, base).name,)
    for end in range(1, len(names) + 1):
        part = THEN.join(names[:end])
        tuned = study.tuned_as(part)
        rates = {job.name for job in tuning if job.chain == tuned and job.expert in (None, expert)}
        job = add(Job(RUN, base, part, study.expert_of(part, expert), seed, None, (*needs, *sorted(rates))))
        needs = (job.name,)
    return job.name


class Folder:
    """Where a study's files lie: a result per finished job, written last, and the models that others start from."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def model(self, name: str) -> Path:
        return self.path / "models" / f"{name}.pt"

    def result(self, name: str) -> Path:
        return self.path / "results" / f"{name}.json"

    def finished(self, job: Job) -> bool:
        return self.result(job.name).is_file()

    def read(self, name: str) -> dict:
        return json.loads(self.result(name).read_text(encoding="utf-8"))

    def write(self, name: str, record: dict) -> None:
        """Whole or not at all: an interrupted run leaves no result."""
        path = self.result(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(record), encoding="utf-8")
        scratch.replace(path)


def rate_scores(records: list[dict], chain: str, expert: str | None) -> dict[float, float]:
    """Mean development pass@1 by rate, over the bases and seeds of a chain's tuning records."""
    scores: dict[float, list[float]] = {}
    for record in records:
        if record["kind"] == TUNING and record["chain"] == chain and record["expert"] in (None, expert):
            scores.setdefault(record["rate"], []).append(record["metrics"]["pass_at"]["1"])
    return {rate: sum(found) / len(found) for rate, found in sorted(scores.items())}


def chosen_rate(records: list[dict], chain: str, expert: str | None) -> float:
    """The rate with the best development pass@1 of a chain; of equals the smallest.

    Raises: ValueError where nothing was tuned for the chain and expert.
    """
    scores = rate_scores(records, chain, expert)
    if not scores:
        raise ValueError(f"tuning must hold runs of {chain}, got none.")
    return max(scores, key=lambda rate: scores[rate])
