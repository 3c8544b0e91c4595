"""What a run found, as a table: stages, failing tests by name, time over the floor by case, traffic."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.programs import last_line, lines_of

NAMED = 20  # tests that failed, of each file: the first one may have brought down the others


def text(results: Path, lines: list[dict]) -> str:
    parts = ["", "stage            outcome      seconds"]
    parts += [f"{line['stage']:<16} {line['outcome']:<12} {line['seconds']:7.1f}  {line['why']}" for line in lines]
    for pattern, read in (("*tests.jsonl", _tests), ("*.json", _benchmark)):
        for file in sorted(results.glob(pattern)):
            try:
                parts += read(file)
            except Exception as error:  # a file that was torn, or is of someone else
                parts.append(f"{file.name} cannot be read: {error!r}")
    return "\n".join([*parts, *_traffic(lines)])


def tests_of(file: Path) -> dict[str, dict]:
    """By name, the last line of each test."""
    return {line["test"]: line for line in lines_of(file)}


def counts(file: Path) -> dict[str, int]:
    """How many tests had which outcome."""
    return dict(Counter(test["outcome"] for test in tests_of(file).values()))


def _tests(file: Path) -> Iterator[str]:
    yield f"{file.name}: " + ", ".join(f"{number} {outcome}" for outcome, number in counts(file).items())
    bad = [test for test in tests_of(file).values() if test["outcome"] in ("failed", "begun")]
    yield from (f"  {test['outcome'].upper()} {test['test']}: {last_line(test['why'])[:160]}" for test in bad[:NAMED])
    if len(bad) > NAMED:
        yield f"  and {len(bad) - NAMED} more"


def _benchmark(file: Path) -> Iterator[str]:
    for result in json.loads(file.read_text(encoding="utf-8"))["results"]:
        yield f"{file.name}: {result['label']}"
        timed = [o for o in result["outcomes"] if o["status"] == "timed"]
        for o in sorted(timed, key=lambda o: o["median_s"]):
            over = f"{o['over_floor']:6.2f} × floor" if "over_floor" in o else ""
            yield f"  {o['name']:<46} {o['median_s'] * 1e3:10.3f} ms {over}"
        yield from (f"  {o['name']}: {o['status']}: {o['why'][:120]}" for o in result["outcomes"]
                    if o["status"] in ("failed", "wrong answer"))  # fmt: skip


def _traffic(lines: list[dict]) -> Iterator[str]:
    for line in lines:
        for launch in line.get("launches", ()):
            yield f"{line['stage']}: {launch['kernel'][:40]} {launch['passes']:.2f} passes (floor 2), " \
                  f"{launch.get('issue_active_percent', 0):.0f} % of issue slots"  # fmt: skip
