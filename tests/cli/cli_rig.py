"""A run of `gft train` small enough for a test: its configuration and data, and the command in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import trainer_rig as rig
import yaml

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


def gft(*arguments, **options):
    """The command as it is started: `stderr` is text, `env` is added to this process's environment."""
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    added = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    command = [sys.executable, "-m", "gft_kernels.cli", *arguments]
    options = {"stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen(command, env={**os.environ, **added}, **options)


def wait_for_steps(process, run, count=3):
    """Until the run has logged some steps."""
    metrics, deadline = Path(run, "metrics.jsonl"), time.monotonic() + 90
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= count):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.05)
