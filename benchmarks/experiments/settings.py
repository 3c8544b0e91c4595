"""A study: what its YAML file says, checked key by key before anything is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.experiments import claims
from benchmarks.experiments.methods import METHODS, depends_on_expert, stages

STUDIES = Path(__file__).parent / "studies"
UNITS = ("bases", "seeds and prompts")


@dataclass(frozen=True)
class Cells:
    """A block of the grid: every chain with every expert, base and seed."""

    chains: list[str]
    experts: list[str]
    bases: list[int]
    seeds: list[int]


@dataclass(frozen=True)
class Tuning:
    """The search for learning rates: every method alike, on bases, seeds and held-out prompts of its own.

    methods: chains, whose last stage's rate is sought after the others' own. prompts: how many; None: as in the end."""

    methods: list[str]
    experts: list[str]
    rates: list[float]
    bases: list[int]
    seeds: list[int]
    prompts: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """After training: `samples` responses at temperature 1 to each of `prompts` held-out prompts; entropy, KL and the
    experts' likelihood at the first `scored` of them (None: all); `retention` prompts of the general tasks; `curve`
    held-out prompts, one sample each, during training. 0: that is not asked."""

    prompts: int = 96
    samples: int = 16
    retention: int = 200
    curve: int = 64
    scored: int | None = None


@dataclass(frozen=True)
class Study:
    """base, stage: options of GFTConfig for fitting the base model and for every training stage after it.
    follow_steps: optimizer steps of a stage that follows another. rates: learning rates where nothing is tuned.
    group: responses per prompt wherever groups are compared. claims: a file in benchmarks/experiments/claims.
    unit: what a claim is decided over, "bases" (seeds within them) or, of one base, "seeds and prompts"."""

    name: str
    task: dict[str, Any]
    base: dict[str, Any]
    stage: dict[str, Any]
    follow_steps: int
    grid: list[Cells]
    tuning: Tuning | None = None
    rates: dict[str, float] = field(default_factory=dict)
    evaluation: Evaluation = field(default_factory=Evaluation)
    group: int = 8
    claims: str = claims.EXPLORATORY
    unit: str = "bases"

    def __post_init__(self):
        tuned = self.tuning.methods if self.tuning else []
        named = [name for cells in self.grid for chain in cells.chains for name in stages(chain)]
        for name in [*named, *(name for chain in tuned for name in stages(chain))]:
            if name not in METHODS:
                raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}.")
        if not claims.path_of(self.claims).is_file():
            raise ValueError(f"claims must be a file in {claims.FOLDER.name}, got {self.claims!r}.")
        if self.unit not in UNITS:
            raise ValueError(f"unit must be one of {', '.join(UNITS)}, got {self.unit!r}.")
        if bool(self.rates) == bool(self.tuning):
            raise ValueError("either `tuning` or `rates` must be given, got both or none.")
        missing = {METHODS[name].tuned_as or "sft" for name in named if METHODS[name].trains} - {*self.rates, *tuned}
        if missing:
            raise ValueError(f"learning rates must be tuned or given for {', '.join(sorted(missing))}, got none.")

    def expert_of(self, chain: str, expert: str) -> str | None:
        """The expert a run is filed under; None where it makes no difference, so that one run serves all."""
        return expert if depends_on_expert(chain) else None

    def tuned_as(self, chain: str) -> str | None:
        """Whose tuned rate the last stage of a chain takes: that of the chain itself, if it was tuned as a whole."""
        if self.tuning and chain in self.tuning.methods:
            return chain
        return METHODS[stages(chain)[-1]].tuned_as

    @property
    def registered(self) -> bool:
        """Whether its claims were written before its runs."""
        return self.claims != claims.EXPLORATORY

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)


def load(path: str | Path, changes: Sequence[str] = ()) -> Study:
    """The study of a YAML file, or of a name in benchmarks/experiments/studies. changes: "key.key=value", in YAML.

    Raises: FileNotFoundError, ValueError naming the key.
    """
    file = Path(path) if Path(path).suffix else STUDIES / f"{path}.yaml"
    if not file.is_file():
        raise FileNotFoundError(f"study must be a YAML file or one of {', '.join(names())}, got {str(path)!r}.")
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    for change in changes:
        _change(values, change)
    return from_dict(values)


def names() -> list[str]:
    """Of the studies here."""
    return sorted(path.stem for path in STUDIES.glob("*.yaml"))


def _change(values: dict, change: str) -> None:
    key, given, value = change.partition("=")
    *outer, last = key.split(".")
    place: Any = values
    for name in outer:
        place = place.get(name) if isinstance(place, dict) else None
    if not given or not isinstance(place, dict):
        raise ValueError(f"--set must be KEY=VALUE with a key of the study, got {change!r}.")
    place[last] = yaml.safe_load(value)


def from_dict(values: dict) -> Study:
    values = dict(values)
    values["grid"] = [_build(Cells, cells, "grid") for cells in values.get("grid") or []]
    for key, kind in (("tuning", Tuning), ("evaluation", Evaluation)):
        given = values.pop(key, None)
        if given is not None:
            values[key] = _build(kind, given, key)
    return _build(Study, values, "the study")


def _build(kind, values, where):
    fields = dataclasses.fields(kind)
    unknown = sorted(set(values) - {f.name for f in fields})
    needed = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING}
    if unknown:
        raise ValueError(f"{where} must have keys among {', '.join(f.name for f in fields)}, got {unknown[0]!r}.")
    if needed - set(values):
        raise ValueError(f"{where} must give {', '.join(sorted(needed - set(values)))}, got nothing.")
    return kind(**values)
