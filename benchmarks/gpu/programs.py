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
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
GRACE_S = 4.0  # for a program to write what it has, after SIGINT
KEPT_CHARACTERS = 4000  # of its output, in a line of the results
READ_BYTES = 1 << 20  # of its output at most, half from the beginning
FILE_BYTES = 16 << 30  # of any file that it writes, its output included: who prints without end must not fill the disk
# Ends the program's group when the pipe from its starter closes without a word: also if that one was killed.
GUARD = "import os, signal, sys; sys.stdin.read() or os.killpg(int(sys.argv[1]), signal.SIGKILL)"


class StoppedError(BaseException):
    """The run has been told to end (by a signal): its program is ended, and what there is is written."""


@dataclass(frozen=True)
class Ended:
    """outcome: passed, failed, out of time, stopped (with the run), or skipped (the machine lacks something)."""

    outcome: str
    seconds: float
    why: str = ""
    output: str = ""

    def line(self, name: str) -> dict:
        kept = {} if self.outcome in ("passed", "skipped") else {"output": self.output[-KEPT_CHARACTERS:]}
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return {
            "stage": name,
            "outcome": self.outcome,
            "seconds": round(self.seconds, 1),
            "why": self.why,
            "ended": at,
        } | kept


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


def run(command: list[str], limit_s: float, log: Path, environment: dict[str, str]) -> Ended:
    """Run it in the repository's root, in a process group of its own, its output in `log`."""
    started = time.monotonic()
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                                       stderr=subprocess.STDOUT, start_new_session=True,
                                       preexec_fn=_prepare)  # fmt: skip
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
        except StoppedError as told:
            outcome, why = "stopped", f"ended by {told}"
        finally:
            _signal(process, signal.SIGKILL)  # whatever it has started and left behind
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)  # who hangs in a driver's call does not even die
            if guard:
                guard.communicate(b"done")
    return Ended(outcome, time.monotonic() - started, why, _output(log))


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


def _signal(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
