"""A program under a time limit: interrupted first, killed then, and never longer alive than who started it."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
POLL_S = 0.05  # between two looks at who is running
GRACE_S = 4.0  # for a program to write what it has, after SIGINT
KEPT_CHARACTERS = 4000  # of its output, in a line of the results
READ_BYTES = 1 << 20  # of its output at most, half from the beginning
FILE_BYTES = 16 << 30  # of any file that it writes, its output included: who prints without end must not fill the disk
# Ends the program's group when the pipe from its starter closes without a word: also if that one was killed.
GUARD = "import os, signal, sys; sys.stdin.read() or os.killpg(int(sys.argv[1]), signal.SIGKILL)"


@dataclass(frozen=True)
class Ended:
    """outcome: passed, failed, out of time, stopped (with the run), or skipped (the machine lacks something)."""

    outcome: str
    seconds: float
    why: str = ""
    output: str = ""

    def line(self, name: str) -> dict:
        line = {"stage": name, "outcome": self.outcome, "seconds": round(self.seconds, 1), "why": self.why}
        line["ended"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        kept = {} if self.outcome in ("passed", "skipped") else {"output": self.output[-KEPT_CHARACTERS:]}
        return line | kept


def last_line(text: str) -> str:
    """Of what a program printed, which names its error."""
    return (text.strip().splitlines() or [""])[-1]


def say(text: str) -> None:
    """On the screen, if anybody still listens."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def append(file: Path, line: dict) -> None:
    """A line of JSON at the end of the file; on the screen where no file can take it (a disk that is full)."""
    text = json.dumps(line, ensure_ascii=False)
    try:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(text + "\n")
    except OSError as error:
        say(f"{file.name}: {error.strerror}; {text}")


def lines_of(file: Path) -> list[dict]:
    """What `append` wrote, without lines that were torn: whoever wrote may have been killed."""
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n") if file.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


class Program:
    """A program in the repository's root, in a process group of its own, its output in `log`.

    Raises OSError where it does not start, or there is no room for its output.
    """

    def __init__(self, command: list[str], limit_s: float, log: Path, environment: dict[str, str]):
        self.log, self.started, self.interrupted = log, time.monotonic(), False
        self.patience_s = max(0.1, limit_s - GRACE_S)
        with log.open("wb") as output:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                                            stderr=subprocess.STDOUT, start_new_session=True,
                                            preexec_fn=_prepare)  # fmt: skip
        try:
            self.guard = subprocess.Popen([sys.executable, "-S", "-c", GUARD, str(self.process.pid)],
                                          stdin=subprocess.PIPE, start_new_session=True)  # fmt: skip
        except OSError:
            self._signal(signal.SIGKILL)
            raise

    def ended(self, told: Sequence[str] = ()) -> Ended | None:
        """What became of it; None: it runs. Near its limit it is interrupted, GRACE_S later killed.

        told: the signals that have told the run to end: it is killed at once.
        """
        status, seconds = self.process.poll(), time.monotonic() - self.started
        if status is None and not told and seconds < self.patience_s + GRACE_S:
            if seconds > self.patience_s and not self.interrupted:
                self.interrupted = True
                self._signal(signal.SIGINT)
            return None
        if self.interrupted:
            outcome, why = "out of time", f"ended after {seconds:.0f} s"
        elif status is None:
            outcome, why = "stopped", f"ended by {told[0]}"
        else:
            outcome, why = ("passed", "") if status == 0 else ("failed", f"exit status {status}")
        self._signal(signal.SIGKILL)  # whatever it has started and left behind
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE_S)  # who hangs in a driver's call does not even die
        self.guard.communicate(b"done")
        return Ended(outcome, seconds, why, _output(self.log))

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def _output(log: Path) -> str:
    """What a program printed; of very much, the beginning and the end."""
    half, size = READ_BYTES // 2, log.stat().st_size
    with log.open("rb") as printed:
        if size <= READ_BYTES:
            return printed.read().decode(errors="replace")
        first, _ = printed.read(half), printed.seek(-half, os.SEEK_END)
        between = f"\n[... {size - 2 * half} bytes ...]\n"
        return first.decode(errors="replace") + between + printed.read().decode(errors="replace")


def _prepare() -> None:
    """A driver in a script's background ignores SIGINT; what it starts must not, or it saves nothing at its end."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
