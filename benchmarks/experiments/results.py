"""Results of a study in one file: a first line with settings and provenance, then one line a job, sorted by name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks import provenance
from benchmarks.experiments.jobs import Folder, Job, plan
from benchmarks.experiments.settings import Study, from_dict

PACKED = Path(__file__).parents[1] / "results" / "experiments"


@dataclass(frozen=True)
class Results:
    """What a study found so far. source: {machine, versions, commit} of the machine that packed it."""

    file: Path
    study: Study
    source: dict
    records: list[dict]

    def of(self, chain: str, expert: str, able: bool = True) -> list[dict]:
        """The runs of a chain from the bases that can solve the task (or cannot: able=False).

        Runs to which the expert makes no difference serve every expert.
        """
        wanted, bases = self.study.expert_of(chain, expert), self.bases(able)
        runs = [r for r in self.records if r["kind"] == "run" and r["base"] in bases]
        return [r for r in runs if r["chain"] == chain and r["expert"] == wanted]

    def bases(self, able: bool = True) -> dict[int, float]:
        """pass@1 on the test split of the base models of the grid by number: from `least_base` on, or below it."""
        used = {number for cells in self.study.grid for number in cells.bases}
        records = [r for r in self.records if r["kind"] == "base" and r["base"] in used]
        found = {r["base"]: r["metrics"]["pass_at"]["1"] for r in records}
        return {base: score for base, score in found.items() if (score >= self.study.least_base) == able}

    @property
    def planned(self) -> list[Job]:
        return plan(self.study)


def pack(study: Study, folder: Folder, device: str) -> Path:
    """Writes NAME.jsonl into the folder from every finished job and returns its path."""
    source = {"machine": provenance.machine(device), "versions": provenance.versions(), "commit": provenance.commit()}
    finished = sorted(job.name for job in plan(study) if folder.finished(job))
    lines = [{"study": study.as_dict(), "source": source}, *(folder.read(name) for name in finished)]
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
    return Results(path, from_dict(head["study"]), head["source"], records)
