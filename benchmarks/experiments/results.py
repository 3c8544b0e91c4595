"""Results of a study in one file: a first line with settings and provenance, then one line a job, sorted by name."""

from __future__ import annotations

import functools
import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import provenance
from benchmarks.experiments import claims
from benchmarks.experiments.claims import Claim, claims_of
from benchmarks.experiments.jobs import RUN, Folder, Job, plan
from benchmarks.experiments.settings import Study, from_dict

PACKED = Path(__file__).parents[1] / "results" / "experiments"
USABLE = 0.01
"""pass@1 below which a base model has nothing that could be reinforced: the rule of every study, old and new."""


@dataclass(frozen=True)
class Results:
    """What a study found so far. source: {machine, versions, commit} of the machine that packed it.

    entries: its claims. registered: where they stood before it ran, their commit and its date.
    published: the bases that a first reading counted, by a threshold of its own.
    """

    file: Path
    study: Study
    source: dict
    records: list[dict]
    entries: list[dict]
    registered: dict | None = None
    published: frozenset[int] | None = None

    def of(self, chain: str, expert: str, bases: Collection[int] | None = None) -> list[dict]:
        """The runs of a chain from these bases; None: those that can solve the task.

        Runs to which the expert makes no difference serve every expert.
        """
        wanted, bases = (RUN, chain, self.study.expert_of(chain, expert)), self.usable if bases is None else bases
        return [r for r in self.records if (r["kind"], r["chain"], r["expert"]) == wanted and r["base"] in bases]

    @functools.cached_property
    def bases(self) -> dict[int, float]:
        """pass@1 on the test split of the base models of the grid by number."""
        used = {number for cells in self.study.grid for number in cells.bases}
        records = [r for r in self.records if r["kind"] == "base" and r["base"] in used]
        return {r["base"]: r["metrics"]["pass_at"]["1"] for r in records}

    @property
    def usable(self) -> dict[int, float]:
        return {base: score for base, score in self.bases.items() if score >= USABLE}

    @property
    def weak(self) -> dict[int, float]:
        return {base: score for base, score in self.bases.items() if score < USABLE}

    @property
    def claims(self) -> list[Claim]:
        return claims_of(self.entries)

    @functools.cached_property
    def planned(self) -> list[Job]:
        return plan(self.study)

    def planned_runs(self, chain: str, expert: str) -> set[tuple[int, int]]:
        """Base and seed of every run of a chain that the study plans."""
        wanted = RUN, chain, self.study.expert_of(chain, expert)
        return {(job.base, job.seed) for job in self.planned if (job.kind, job.chain, job.expert) == wanted}


def pack(study: Study, folder: Folder, device: str) -> Path:
    """Writes NAME.jsonl into the folder from every finished job and returns its path."""
    source = {"machine": provenance.machine(device), "versions": provenance.versions(), "commit": provenance.commit()}
    head = {"study": study.as_dict(), "source": source}
    if study.registered:
        head["claims"] = {**provenance.last_change(claims.path_of(study.claims)), "entries": claims.read(study.claims)}
    finished = sorted(job.name for job in plan(study) if folder.finished(job))
    lines = [head, *(folder.read(name) for name in finished)]
    path = folder.path / f"{study.name}.jsonl"
    path.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines), encoding="utf-8")
    return path


def read(path: str | Path) -> Results:
    """Raises: FileNotFoundError, ValueError for a file of another kind."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"results must be a .jsonl file that a study wrote, got {str(path)!r}; there is none.")
    head, *records = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    if not isinstance(head, dict) or "study" not in head:
        raise ValueError(f"results must begin with the settings of a study, got something else in {path}.")
    threshold = head["study"].pop("least_base", None)  # of the first studies, each its own
    entries = head["claims"]["entries"] if "claims" in head else claims.read(claims.EXPLORATORY)
    found = Results(path, from_dict(head["study"]), head["source"], records, entries, head.get("claims"))
    if threshold is None:
        return found
    return replace(found, published=frozenset(b for b, score in found.bases.items() if score >= threshold))
