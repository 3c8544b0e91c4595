"""Runs a study's jobs in worker processes: skips what is finished, shows progress and the time left."""

from __future__ import annotations

import itertools
import json
import os
import signal
import statistics
import threading
from collections.abc import Collection
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process

import torch

from benchmarks import provenance
from benchmarks.experiments import claims
from benchmarks.experiments.jobs import Folder, Job, plan
from benchmarks.experiments.methods import stages
from benchmarks.experiments.settings import Study


class StudyError(RuntimeError):
    """A job failed; the message names it. What is finished stays finished."""


def run(study: Study, folder: Folder, jobs: int, device: str, say=print, later: Collection[str] = ()) -> None:
    """Every unfinished job, each as soon as what it needs is there; at most `jobs` at a time.

    later: methods to be left for another time, and with them what needs their rates or models.
    Raises: StudyError for a failed job, KeyboardInterrupt once the jobs under way have ended.
    """
    planned = plan(study)
    waiting = _not_left([job for job in planned if not folder.finished(job)], later)
    progress = Progress(planned, waiting, folder, jobs, say)
    done = {job.name for job in planned if folder.finished(job)}
    under_way: dict[Future, Job] = {}
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=start_worker) as pool:
        try:
            while waiting or under_way:
                for job in [job for job in waiting if set(job.needs) <= done][: jobs - len(under_way)]:
                    waiting.remove(job)
                    under_way[pool.submit(work, study, folder, job, device)] = job
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    job = under_way.pop(future)
                    _raise_failure(future, job)
                    done.add(job.name)
                    progress.finished(job)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _not_left(jobs: list[Job], later: Collection[str]) -> list[Job]:
    left: set[str] = set()
    for job in jobs:  # each after what it needs
        if not left.isdisjoint(job.needs) or not set(later).isdisjoint(stages(job.chain)):
            left.add(job.name)
    return [job for job in jobs if job.name not in left]


def _raise_failure(future: Future, job: Job) -> None:
    error = future.exception()
    if isinstance(error, BrokenProcessPool):
        raise StudyError(f"{job.name}: its process ended without an answer (killed, or out of memory).") from None
    if error is not None:
        raise StudyError(f"{job.name}: {error}") from error


def keep_settings(study: Study, folder: Folder) -> None:
    """Writes the settings beside the results. The grid may grow later; whatever decides a number may not change.

    Raises: ValueError if the folder holds results of other settings or claims, or if the claims are registered and the
        tree holds changes that no commit names.
    """
    if study.registered and provenance.commit()["dirty"]:
        raise ValueError(f"{study.name} must run from a commit, since its claims are registered, got a changed tree.")
    path = folder.path / "settings.json"
    now = study.as_dict() | ({"entries": claims.read(study.claims)} if study.registered else {})
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key, value in now.items() if key != "grid" and before.get(key) != value]
        if changed:
            raise ValueError(f"--out must be a folder of the same settings, got another `{changed[0]}` in {path}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(now, indent=1), encoding="utf-8")


def start_worker() -> None:
    """One torch thread a worker; it ends at once with Ctrl-C or with its parent, since only whole results count."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    from transformers.utils import logging

    logging.set_verbosity_error()


def _end_with_parent() -> None:
    if (parent := parent_process()) is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def work(study: Study, folder: Folder, job: Job, device: str) -> None:
    from benchmarks.experiments.work import do  # transformers is imported in the workers only

    do(study, folder, job, device)


class Progress:
    """A line per finished job; the time left from how long jobs of the same kind took."""

    def __init__(self, planned: list[Job], waiting: list[Job], folder: Folder, workers: int, say):
        self.total, self.left, self.folder, self.workers, self.say = len(planned), list(waiting), folder, workers, say
        self.seconds: dict[tuple, list[float]] = {}
        finished = [job for job in planned if folder.finished(job)]
        for job in finished:
            self._learn(job)
        left = len(planned) - len(finished) - len(waiting)
        say(f"{len(planned)} jobs, {len(finished)} already finished" + (f", {left} left for later" if left else ""))

    def finished(self, job: Job) -> None:
        self.left.remove(job)
        record = self._learn(job)
        number, score = sum(map(len, self.seconds.values())), record["metrics"]["pass_at"]["1"]
        took = f"{record['seconds']:5.1f} s  left about {self.time_left() / 60:.0f} min"
        self.say(f"[{number:>4}/{self.total}] {job.name:<52} pass@1 {score:.3f}  {took}")

    def _learn(self, job: Job) -> dict:
        record = self.folder.read(job.name)
        self.seconds.setdefault((job.kind, job.method), []).append(record["seconds"])
        return record

    def time_left(self) -> float:
        """Seconds, with all workers at work."""
        usual = statistics.fmean(itertools.chain(*self.seconds.values()))
        known = {kind: statistics.fmean(values) for kind, values in self.seconds.items()}
        return sum(known.get((job.kind, job.method), usual) for job in self.left) / self.workers
