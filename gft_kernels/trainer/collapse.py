"""Signs that a run is coming apart: its entropy, its least log-probability, groups that teach nothing.

Each sign is a flag in every log line (1 where it shows) and one warning when it first shows. What it needs of the past
it reads from the log history, so a resumed run goes on as if it had not stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

ENTROPY_GROWTH = 2.0
ENTROPY_MARGIN = 0.5
"""Entropy (nats) may grow to this multiple of the first log line's, plus this margin. Fitting and reinforcing both
lower the entropy of response tokens; twice the start is noise being learned. The margin keeps a start near 0 from
counting as growth."""

LEAST_LOG_PROB = -50.0
LOG_PROB_FALL = 25.0
"""A response token below e^-50 that is also 25 nats below the first log line's. A language model's least likely token
in real text lies around -20 to -30; one that negative advantages push on, with nothing to hold it, falls on and on."""

SILENT_WINDOWS = 3
"""Log lines in a row in which every group's rewards are equal. One may be chance; three are a reward that does not tell
responses apart, or a policy that always does the same."""

Line = dict[str, float]


def flags(history: Sequence[Line], line: Line) -> Line:
    """collapse/entropy, collapse/min_log_prob and collapse/silent_groups (0 or 1), where the line can tell."""
    lines = [*history, line]
    shown = {}
    if "entropy" in line:
        shown["collapse/entropy"] = line["entropy"] > ENTROPY_GROWTH * first(lines, "entropy") + ENTROPY_MARGIN
    if "min_log_prob" in line:
        lowest = min(LEAST_LOG_PROB, first(lines, "min_log_prob") - LOG_PROB_FALL)
        shown["collapse/min_log_prob"] = line["min_log_prob"] < lowest
    if "zero_std_groups" in line:
        silent = [earlier["zero_std_groups"] == 1.0 for earlier in lines if "zero_std_groups" in earlier]
        shown["collapse/silent_groups"] = len(silent) >= SILENT_WINDOWS and all(silent[-SILENT_WINDOWS:])
    return {name: float(shows) for name, shows in shown.items()}


def warnings_of(history: Sequence[Line], line: Line) -> list[str]:
    """One sentence for each flag of the line that the line before did not have."""
    before = next((earlier for earlier in reversed(history) if "zero_std_groups" in earlier), {})
    risen = [name for name in SENTENCES if line.get(name) and not before.get(name)]
    return [SENTENCES[name].format(**line, start=first([*history, line], FIRST[name])) for name in risen]


def first(lines: Sequence[Line], name: str) -> float:
    return next((line[name] for line in lines if name in line), float("nan"))


FIRST = {
    "collapse/entropy": "entropy",
    "collapse/min_log_prob": "min_log_prob",
    "collapse/silent_groups": "zero_std_groups",
}
SENTENCES = {
    "collapse/entropy": (
        "entropy must stay near where it started, got {entropy:.3g} nats after {start:.3g}; "
        "lower learning_rate or entropy_coef, or go back to a checkpoint"
    ),
    "collapse/min_log_prob": (
        "the least log-probability of a response token must stay bounded, got {min_log_prob:.0f} nats after "
        "{start:.0f}; lower learning_rate; with objective gft, raise tau and leave rectify at 'all'"
    ),
    "collapse/silent_groups": (
        f"rewards must differ within groups, got equal ones in every group for {SILENT_WINDOWS} log lines; "
        "look at completions.jsonl: nothing is being learned"
    ),
}
