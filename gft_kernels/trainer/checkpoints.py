"""Checkpoints to rely on: saved before a signal ends a run, with a manifest of all files; the newest that is whole."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import zipfile
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback

from gft_kernels.data.manifests import MANIFEST, differs, files_of, read_manifest, write_manifest
from gft_kernels.trainer.logs import let_go_of_lost_terminal, say

STATE = "trainer_state.json"
# Under which names Trainer, FSDP and DeepSpeed (global_step*) write each part.
WEIGHTS = ("model*.safetensors", "pytorch_model*", "adapter_model*", "global_step*")
PROGRESS = {"optimizer": ("optimizer*", "global_step*"), "scheduler": ("scheduler.pt", "global_step*")}
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Manifests(TrainerCallback):
    """Writes the manifest of each checkpoint when every rank has written its part; `run` is kept in it as it is."""

    def __init__(self, run: dict | None = None):
        self.run = run

    def on_save(self, args, state, control, **kwargs):
        PartialState().wait_for_everyone()
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if args.should_save and checkpoint.is_dir():
            write_manifest(checkpoint, run=self.run)


class SaveOnInterrupt(TrainerCallback, contextlib.AbstractContextManager):
    """Ctrl-C, SIGTERM or SIGHUP finishes the step, saves a checkpoint and stops; the same once more stops at once.

    Works in the main thread only, where signals arrive. `interrupted` tells afterwards what happened. As a context
    manager (`with stop: trainer.train()`) it gives the signals back even when training raises; GFTTrainer does that.
    """

    def __init__(self):
        self.interrupted = False
        self._before = {}

    def on_train_begin(self, args, state, control, **kwargs):
        for number in SIGNALS:
            ignored = signal.getsignal(number) is signal.SIG_IGN  # nohup: the run is to outlive its terminal
            if number not in self._before and not (ignored and number != signal.SIGINT):
                self._before[number] = signal.signal(number, self._on_signal) or signal.SIG_DFL

    def _on_signal(self, number, frame):
        # Only this signal is given back: a launcher answers Ctrl-C by a SIGTERM to its ranks.
        signal.signal(number, self._before.pop(number))
        if not self.interrupted:
            again = "press Ctrl-C again" if number == signal.SIGINT else "send the signal again"
            say(f"\nfinishing this step, then saving; {again} to stop at once", sys.stderr)
        self.interrupted = True

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:  # signals reach ranks at different times, but all must stop after the same step
            flag = torch.tensor(int(self.interrupted), device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            self.interrupted = bool(flag.item())
        if self.interrupted:
            control.should_save = control.should_training_stop = True
        let_go_of_lost_terminal()

    def on_train_end(self, args, state, control, **kwargs):
        self.restore()

    def restore(self) -> None:
        """The signals mean again what they meant before training."""
        while self._before:
            signal.signal(*self._before.popitem())

    def __exit__(self, *raised):
        self.restore()


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
