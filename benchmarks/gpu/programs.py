"""A program under a time limit: interrupted first, killed then, and never longer alive than who started it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
GRACE_S = 4.0  # for a program to write what it has, after SIGINT
KEPT_CHARACTERS = 4000  # of its output, in a line of the results
# Ends the program's group when the pipe from its starter closes without a word: also if that one was killed.
GUARD = "import os, signal, sys; sys.stdin.read() or os.killpg(int(sys.argv[1]), signal.SIGKILL)"


@dataclass(frozen=True)
class Ended:
    """outcome: passed, failed, out of time, or skipped (the machine lacks something, or no time was left)."""

    outcome: str
    seconds: float
    why: str = ""
    output: str = ""

    def line(self, name: str) -> dict:
        kept = {} if self.outcome in ("passed", "skipped") else {"output": self.output[-KEPT_CHARACTERS:]}
        return {"stage": name, "outcome": self.outcome, "seconds": round(self.seconds, 1), "why": self.why, **kept}


def append(file: Path, line: dict) -> None:
    with file.open("a") as lines:
        lines.write(json.dumps(line, ensure_ascii=False) + "\n")


def run(command: list[str], limit_s: float, log: Path, environment: dict[str, str]) -> Ended:
    """Run it in the repository's root, in a process group of its own, its output in `log`."""
    started = time.monotonic()
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                                       stderr=subprocess.STDOUT, start_new_session=True,
                                       preexec_fn=_hears_interrupts)  # fmt: skip
        except OSError as error:
            return Ended("failed", 0.0, f"{command[0]} does not start: {error}")
        guard = None
        try:
            guard = subprocess.Popen([sys.executable, "-S", "-c", GUARD, str(process.pid)], stdin=subprocess.PIPE,
                                     start_new_session=True)  # fmt: skip
            status = process.wait(max(0.1, limit_s - GRACE_S))
            outcome, why = ("passed", "") if status == 0 else ("failed", f"exit status {status}")
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
            outcome, why = "out of time", f"ended after {time.monotonic() - started:.0f} s"
        finally:
            _signal(process, signal.SIGKILL)  # whatever it has started and left behind
            process.wait()
            if guard:
                guard.communicate(b"done")
    return Ended(outcome, time.monotonic() - started, why, log.read_text(errors="replace"))


def _hears_interrupts() -> None:
    """A driver in a script's background ignores SIGINT; what it starts must not, or it saves nothing at its end."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _signal(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
