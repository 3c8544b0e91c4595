"""The examples run. plain_pytorch.py learns, and takes the same step however it is cut into parts and processes."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import sys
from pathlib import Path

import pytest
from ranks import start_ranks

ROOT = Path(__file__).parents[2]
EXAMPLE = str(ROOT / "examples" / "plain_pytorch.py")


def numbers(shown: str) -> list[list[float]]:
    """The numbers of each line an example prints: step, loss, gradient norm, sampled reward."""
    return [[float(x) for x in re.findall(r"[-+]?\d+\.?\d*", line)] for line in shown.splitlines()]


def lines_of(example: str, *arguments: str) -> list[list[float]]:
    """The example as a program, in this process: what it imports is imported already."""
    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(io.StringIO()) as shown:
        patched.setattr(sys, "argv", [example, *arguments])
        runpy.run_path(example, run_name="__main__")
    return numbers(shown.getvalue())


@pytest.fixture(scope="module")
def one_process() -> list[list[float]]:
    return lines_of(EXAMPLE, "--steps", "60")


def test_it_learns(one_process):
    early, late = (sum(line[3] for line in part) / 10 for part in (one_process[:10], one_process[-10:]))
    assert early < 0.2 and late > 0.6


def assert_same_steps(lines: list[list[float]], expected: list[list[float]]) -> None:
    assert len(lines) == 3
    for line, other in zip(lines, expected, strict=False):
        assert line == pytest.approx(other, abs=2e-5)  # the last digit printed is the fifth


@pytest.mark.parametrize("prompts", ["2", "16"])
def test_micro_batches_do_not_change_a_step(one_process, prompts):
    assert_same_steps(lines_of(EXAMPLE, "--steps", "3", "--prompts-per-micro-batch", prompts), one_process)


def one_of_two(rank: int, folder: Path) -> list[list[float]]:
    return lines_of(EXAMPLE, "--steps", "3")


@pytest.mark.slow
def test_processes_do_not_change_a_step(one_process, tmp_path):
    """In the environment that torchrun sets."""
    first, second = start_ranks(one_of_two, tmp_path, 2)
    assert_same_steps(first, one_process)
    assert not second


def test_trl_digit_sums_fits_and_tunes():
    pytest.importorskip("trl", reason="trl is not installed: pip install 'gft-kernels[trl]'")
    example = str(ROOT / "examples" / "integrations" / "trl_digit_sums.py")
    *fitted, before, first, second, after, last = lines_of(example, "--sft-steps", "60", "--steps", "2")
    assert len(fitted) == 5 and fitted[-1][1] < 0.8 * fitted[0][1]  # the loss
    assert before[0] == 0 and after[0] == 2 and len(last) == 3
    assert 0.125 <= first[2] <= 1 and 0.125 <= second[2] <= 1  # the reward: the expert is always right
