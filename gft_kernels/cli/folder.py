"""The folder of a run: one process trains in it at a time, run.yaml says with what, a resumed run is the same run."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import socket
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from gft_kernels.cli.settings import RunSettings, Secret
from gft_kernels.data.manifests import read_manifest
from gft_kernels.trainer import GFTConfig
from gft_kernels.trainer.checkpoints import checkpoints, newest_whole
from gft_kernels.trainer.config import settle
from gft_kernels.trainer.logs import COMPLETIONS_FILE, METRICS_FILE

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as launchers say
LOCK, RECORD, README = ".lock", "run.yaml", "README.md"
MODELS = ("model*.safetensors", "pytorch_model*.bin", "adapter_model*")
# How options begin that a resumed run may have others of: they say what is shown and kept, not what a step is.
FREE = ("eval_", "per_device_eval_", "log_", "logging_", "report_to", "run_name", "project", "disable_tqdm", "save_",
        "hub_", "push_to_hub", "output_dir", "model_config", "token_metrics", "load_best_model_at_end",
        "metric_for_best_model", "greater_is_better", "dataloader_num_workers", "dataloader_prefetch_factor",
        "dataloader_persistent_workers", "dataloader_pin_memory", "vllm_memory")  # fmt: skip
PLACES = ("model", "tokenizer", "data")
LENGTH = ("max_steps", "num_train_epochs")
ROWS, PROCESSES = "the rows of data", "the number of processes"


@contextlib.contextmanager
def locked(output_dir: str) -> Iterator[None]:
    """Holds the folder for this run: rank 0's lock, which the system takes back however the process ends.

    Raises: ValueError if another run holds it or it cannot be written.
    """
    if RANK != 0:
        yield
        return
    path = Path(output_dir, LOCK)
    ours = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _opened(path)
    except OSError as error:
        raise ValueError(f"output_dir must be a writable folder, got {output_dir!r}; {error.strerror}.") from None
    with file:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
                if ours:
                    path.parent.rmdir()  # if nothing came of the run


def _opened(path: Path):
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise ValueError(
                f"output_dir must not be in use, got {str(path.parent)!r}, in which {holder} trains; choose another."
            ) from None
        except (OSError, ImportError):
            pass  # a system or a file system without such locks
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                break
        file.close()  # its holder removed it meanwhile
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def starting_point(output_dir: str, resume: bool, anyway: bool) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, or None for a fresh run, and what is to be said about it.

    Raises: ValueError if the directory holds no whole one, or (fresh run) another run.
    """
    if not resume:
        there = [*checkpoints(output_dir), *(p for pattern in MODELS for p in Path(output_dir).glob(pattern))]
        if there:
            raise ValueError(
                f"output_dir must hold no other run, got {str(there[0])!r}; add --resume or choose another."
            )
        return None, []
    found, notes = newest_whole(output_dir, RANKS, weights_suffice=anyway)
    if found is None:
        why = "; ".join(notes) or f"none in {output_dir!r}"
        raise ValueError(f"--resume must find a whole checkpoint in output_dir, got {why}; choose another one.")
    if read_manifest(found) is None:
        notes.append(f"{found} has no manifest: its files are there, but whether they are what was saved is not known")
    return found, notes


def run_of(settings: RunSettings, options: dict[str, Any], records: Iterable[dict]) -> dict[str, Any]:
    """What makes a run what it is: its settings without secrets, its rows (as one hash) and its processes."""
    found = hashlib.blake2b(digest_size=16)
    for record in records:
        found.update(json.dumps(record, sort_keys=True, default=str).encode("utf-8", "surrogatepass"))
    values = without_secrets({**vars(settings), **options})
    values |= {key: _place(values[key]) for key in PLACES} | {ROWS: found.hexdigest(), PROCESSES: RANKS}
    return json.loads(json.dumps(values, default=str))


def changes(checkpoint: Path, now: dict[str, Any], anyway: bool) -> list[str]:
    """What is to be said of the settings that differ from those a checkpoint was made with.

    Raises: ValueError if they make another run of it and `anyway` is False.
    """
    before = (read_manifest(checkpoint) or {}).get("run") or _record(checkpoint.parent / RECORD)
    if before is None:
        return [f"{checkpoint} does not say with which settings it was made"]
    same_rows = ROWS in before and before[ROWS] == now[ROWS]
    unknown = {key: now[key] for key in (ROWS, PROCESSES)}  # to an older checkpoint
    was, given = _settled({**unknown, **before}), _settled(now)
    told, refused = [], []
    for key in sorted({*before, *now}):
        old, new = was.get(key), given.get(key)
        if old == new or (same_rows and key in ("data", "reader")) or key.startswith(FREE):
            continue
        told.append("the rows of data differ" if key == ROWS else f"{key} was {old!r} and is {new!r}")
        if key not in LENGTH:
            refused.append(told[-1])
    if refused and not anyway:
        raise ValueError(
            f"--resume must go on with the settings of {checkpoint}, got others: {'; '.join(refused)}; "
            "restore them, or add --resume-anyway."
        )
    return [f"since {checkpoint}: {'; '.join(told)}"] if told else []


def _settled(values: dict[str, Any]) -> dict[str, Any]:
    """Every setting as the run has it: defaults, the objective's own, and each place by its full name."""
    run: Any = types.SimpleNamespace(
        **{f.name: _default(f) for kind in (RunSettings, GFTConfig) for f in dataclasses.fields(kind)}
    )
    vars(run).update(values)
    with contextlib.suppress(ValueError, TypeError, KeyError):  # of another version, which had other options
        settle(run)
    run.tokenizer = run.tokenizer or run.model
    return vars(run) | {key: _place(getattr(run, key)) for key in PLACES}


def _place(name: str | None) -> str | None:
    """A path that is there by its full name, anything else as it is."""
    return str(Path(name).resolve()) if name and Path(name).exists() else name


def _default(field) -> Any:
    made = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return None if made is dataclasses.MISSING else json.loads(json.dumps(made, default=str))


def _record(path: Path) -> dict | None:
    try:
        return json.loads(json.dumps(yaml.safe_load(path.read_text(encoding="utf-8")), default=str))
    except (OSError, ValueError, yaml.YAMLError):
        return None


def begin(output_dir: str, settings: RunSettings, options: dict[str, Any], fresh: bool) -> list[str]:
    """Writes run.yaml, for its owner's eyes only; a fresh run sets another one's log aside, which the result says."""
    folder, notes = Path(output_dir), []
    for name in (METRICS_FILE, COMPLETIONS_FILE, README):
        if fresh and (folder / name).is_file():
            os.replace(folder / name, folder / f"{name}.before")
            notes.append(f"{folder / name} is of another run and now called {name}.before")
    defaults = {f.name: f.default for f in dataclasses.fields(settings)}
    values = {**{name: value for name, value in vars(settings).items() if value != defaults[name]}, **options}
    kept = without_secrets(values)
    text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    text += "".join(f"# {key} is not written down\n" for key in values if key not in kept)
    path = folder / RECORD
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    return notes


def without_secrets(values: Any) -> Any:
    """The same nest of mappings and lists without the entries that are secrets."""
    if isinstance(values, dict):
        return {key: without_secrets(value) for key, value in values.items() if not isinstance(value, Secret)}
    return [without_secrets(value) for value in values] if isinstance(values, list) else values
