"""What a run found, as a table: stages, failing tests by name, time over the floor by case, traffic."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from benchmarks import report
from benchmarks.gpu.stages import Run


def text(run: Run, lines: list[dict]) -> str:
    parts = ["", "stage            outcome      seconds"]
    parts += [f"{line['stage']:<16} {line['outcome']:<12} {line['seconds']:7.1f}  {line['why']}" for line in lines]
    found = [part for of in (_tests, _benchmarks) for part in of(run.results)]
    return "\n".join([*parts, *found, *_traffic(lines)])


def _tests(results: Path) -> Iterator[str]:
    file = results / "tests.jsonl"
    if not file.exists():
        return
    tests = [json.loads(line) for line in file.read_text().splitlines()]
    counts = Counter(test["outcome"] for test in tests)
    yield "tests: " + ", ".join(f"{number} {outcome}" for outcome, number in counts.items())
    yield from (f"  FAILED {test['test']}: {_last(test['why'])}" for test in tests if test["outcome"] == "failed")


def _last(why: str) -> str:
    return (why.strip().splitlines() or [""])[-1][:160]


def _benchmarks(results: Path) -> Iterator[str]:
    for file in sorted(results.glob("*.json")):
        for result in report.load(file)["results"]:
            yield f"{file.name}: {result['label']}"
            for o in sorted(report.timed(result), key=lambda o: o["median_s"]):
                over = "" if o["over_floor"] is None else f"{o['over_floor']:6.2f} × floor"
                yield f"  {o['name']:<46} {report.duration(o['median_s']):>10} {over}"
            yield from (f"  {o['name']}: {o['status']}: {o['why'][:120]}" for o in result["outcomes"]
                        if o["status"] in ("failed", "wrong answer"))  # fmt: skip


def _traffic(lines: list[dict]) -> Iterator[str]:
    for line in lines:
        for launch in line.get("launches", ()):
            yield f"{line['stage']}: {launch['kernel'][:40]} {launch['passes']:.2f} passes (floor 2), " \
                  f"{launch.get('issue_active_percent', 0):.0f} % of issue slots"  # fmt: skip
