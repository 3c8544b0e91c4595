"""A run of `gft train` small enough for a test: its configuration and data, and the command in a process of its own."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import termios
import time
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from pathlib import Path

import torch
import trainer_rig as rig
import yaml
from processes import CONTEXT

from gft_kernels.cli import main

ROOT = Path(__file__).parents[2]


def write_run(tmp_path, model_path, data=None, **options):
    """A configuration file and a data file; returns the path of the former."""
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rig.rows() if data is None else data)))
    settings = {
        "model": str(model_path), "data": str(tmp_path / "rows.jsonl"), "output_dir": str(tmp_path / "run"),
        "rewards": ["trainer_rig:digit_count"], "num_demonstrations": 2, "num_generations": 2,
        "max_completion_length": 10, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1,
        "max_steps": 3, "log_completions_steps": 2, "disable_tqdm": True, "use_cpu": True, "save_strategy": "steps",
        "save_steps": 1,
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**settings, **options}))
    return str(path)


def gft(errors: Path, *arguments: str, terminal: int | None = None) -> BaseProcess:
    """The command in a process that leads the terminal, if one is given, and says all there.

    Without one, `errors` is the file that takes what it says.
    """
    shown = None if terminal is None else _Passed(terminal)
    process = CONTEXT.Process(target=_started, args=(errors, arguments, shown), daemon=True)
    process.start()
    return process


class _Passed:
    """A file descriptor on its way into a process that is being started."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self):
        return DupFd(self.number).detach, ()


def _started(errors: Path, arguments: tuple[str, ...], terminal: int | None) -> None:
    torch.set_num_threads(1)
    if terminal is None:
        shown = os.open(errors, os.O_WRONLY | os.O_CREAT)
    else:
        shown = terminal
        os.setsid()
        fcntl.ioctl(shown, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    for number in (0, 1, 2):
        os.dup2(shown, number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.exit(main(list(arguments)))


def wait_for_steps(process: BaseProcess, run: Path, count: int = 3) -> None:
    """Until the run has logged some steps."""
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 90
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= count):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.05)
