"""How a command ends: 0 done, 1 failed, 2 bad input, 130 stopped; and an error as the one line that says why."""

from __future__ import annotations

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
