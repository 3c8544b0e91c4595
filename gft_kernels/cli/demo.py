"""`gft demo`: a real language model that learns to extract, or a model from scratch; each in a few minutes on a CPU."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from gft_kernels.cli import extraction_demo, scratch_demos

TAKES = {"gsm8k": ("data",), "digit-sum": (), **dict.fromkeys(extraction_demo.TASKS, ("model", "seed"))}


def demo(out: str, part: str, **given: Any) -> str:
    """One training; its models, logs and plots lie in `out`. given: `data`, `model`, `seed`, or None.

    Returns: how long it took.
    Raises: ValueError for an option that the part does not take; FileNotFoundError, RowError for `data` that is no
    GSM8K.
    """
    options = {name: value for name, value in given.items() if value is not None}
    for name in options:
        if name not in TAKES[part]:
            parts = " or ".join(other for other, names in TAKES.items() if name in names)
            raise ValueError(f"--{name} must go with --only {parts}, got {part}; leave it out.")
    directory, start = Path(out, part), time.perf_counter()
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)  # what cannot be written is said before the data is made
    if part == "gsm8k":
        scratch_demos.gsm8k_demo(directory, options.get("data"))
    elif part == "digit-sum":
        scratch_demos.digit_sum_demo(directory)
    else:
        extraction_demo.run(directory, part, **options)
    return f"{part}: {time.perf_counter() - start:.0f} s"
