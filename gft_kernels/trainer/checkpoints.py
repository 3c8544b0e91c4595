"""Checkpoints to rely on: a manifest, written last, of all files of one, and the newest checkpoint that is whole.

A file's mark is the hash of its bytes, or for a large file of 16 blocks spread over it: that shows a file that was cut,
emptied or exchanged, at a cost that does not grow with the model.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from pathlib import Path

from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback

MANIFEST, STATE = "manifest.json", "trainer_state.json"
BLOCK, BLOCKS = 1 << 20, 16
# Under which names Trainer, FSDP and DeepSpeed (global_step*) write each part.
WEIGHTS = ("model*.safetensors", "pytorch_model*", "adapter_model*", "global_step*")
PROGRESS = {"optimizer": ("optimizer*", "global_step*"), "scheduler": ("scheduler.pt", "global_step*")}


class Manifests(TrainerCallback):
    """Writes the manifest of each checkpoint when every rank has written its part; `run` is kept in it as it is."""

    def __init__(self, run: dict | None = None):
        self.run = run

    def on_save(self, args, state, control, **kwargs):
        PartialState().wait_for_everyone()
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if args.should_save and checkpoint.is_dir():
            write_manifest(checkpoint, self.run)


def write_manifest(checkpoint: Path, run: dict | None = None) -> None:
    """Size and mark of every file in a checkpoint, and what is to be known of its run; the file appears whole."""
    files = {str(path.relative_to(checkpoint)): [path.stat().st_size, mark(path)] for path in files_of(checkpoint)}
    unfinished = checkpoint / f".{MANIFEST}"
    unfinished.write_text(json.dumps({"files": files, "run": run}, indent=1), encoding="utf-8")
    os.replace(unfinished, checkpoint / MANIFEST)


def read_manifest(checkpoint: Path) -> dict | None:
    """What `write_manifest` wrote, or None where it did not. Raises ValueError if it cannot be read."""
    path = checkpoint / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name not in (MANIFEST, f".{MANIFEST}"))


def mark(path: Path) -> str:
    size, found = path.stat().st_size, hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        for i in range(BLOCKS):
            if size > BLOCK * BLOCKS:
                file.seek((size - BLOCK) * i // (BLOCKS - 1))
            found.update(file.read(BLOCK))
    return found.hexdigest()


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints of a run that hold any file, the newest first."""
    numbered = [p for p in Path(output_dir).glob("checkpoint-*") if p.name.partition("-")[2].isdigit()]
    return sorted(filter(files_of, numbered), key=lambda p: int(p.name.partition("-")[2]), reverse=True)


def newest_whole(
    output_dir: str | Path, world_size: int = 1, weights_suffice: bool = False
) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, or None, and a sentence on each newer one that is not.

    world_size: ranks that will read it. weights_suffice: optimizer, scheduler and random states may be absent.
    """
    torn: list[str] = []
    for checkpoint in checkpoints(output_dir):
        fault = fault_of(checkpoint, world_size, weights_suffice)
        if fault is None:
            return checkpoint, torn
        torn.append(f"{checkpoint} is not whole: {fault}")
    return None, torn


def fault_of(checkpoint: Path, world_size: int = 1, weights_suffice: bool = False) -> str | None:
    """Why nothing should go on from a checkpoint, or None.

    Without a manifest (an older checkpoint, or a plain Trainer's) its files must be there and open, no more is known.
    """
    try:
        manifest = read_manifest(checkpoint)
        fault = fault_of_contents(checkpoint) if manifest is None else differs(checkpoint, manifest["files"])
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    return fault or missing_part(checkpoint, world_size, weights_suffice)


def differs(checkpoint: Path, files: dict[str, list]) -> str | None:
    for name, (size, expected) in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if mark(path) != expected:
            return f"{name} is not the file that was saved"
    return None


def missing_part(checkpoint: Path, world_size: int, weights_suffice: bool) -> str | None:
    if not (checkpoint / STATE).is_file():
        return f"{STATE} is missing"
    random = [f"rng_state_{rank}.pth" for rank in range(world_size)] if world_size > 1 else ["rng_state.pth"]
    parts = {"model": WEIGHTS} if weights_suffice else {"model": WEIGHTS, **PROGRESS, **{r: (r,) for r in random}}
    for part, patterns in parts.items():
        if not any(path for pattern in patterns for path in checkpoint.glob(pattern)):
            return f"its {part} is missing"
    return None


def fault_of_contents(checkpoint: Path) -> str | None:
    """The first file that is cut short, as far as its own form tells, or an index's file that is missing."""
    for path in files_of(checkpoint):
        try:
            if path.suffix == ".json":
                fields = json.loads(path.read_text(encoding="utf-8"))
                if path.name == STATE and not isinstance(fields["global_step"], int):
                    raise ValueError
                shards = set(fields["weight_map"].values()) if path.name.endswith(".index.json") else ()
                for shard in shards:
                    if not path.with_name(shard).is_file():
                        return f"{shard} is missing"
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
                raise ValueError
        except (ValueError, KeyError, TypeError, SafetensorError):
            return f"{path.name} cannot be read"
    return None
