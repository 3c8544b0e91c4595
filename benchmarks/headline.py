"""The figures worth quoting from a row result file: `python -m benchmarks.headline RESULTS.json`.

For each dtype, at its first (headline) shape: our time over the floor, everyone's time over ours, what a second thread
gives, extra memory. Documentation quotes these lines, with the file they come from.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from benchmarks import report
from benchmarks.verdicts import best_of_ours, timed, winner_over_us


def lines(saved: dict) -> Iterator[str]:
    results = [result for result in saved["results"] if result["benchmark"] == "row"]
    for dtype in dict.fromkeys(result["case"]["dtype"] for result in results):
        of_dtype = [result for result in results if result["case"]["dtype"] == dtype]
        head, ours = of_dtype[0], best_of_ours(of_dtype[0])
        if ours is None:
            continue
        yield head["label"]
        yield f"  {ours['name']}: {ours['median_s'] * 1e3:.2f} ms, {ours['over_floor']:.2f} × the floor"
        for outcome in sorted(timed(head), key=lambda o: o["median_s"]):
            if outcome["objective"] == "gft" and outcome is not ours:
                yield f"  {outcome['name']}: {outcome['median_s'] / ours['median_s']:.1f} × our time"
        yield from (f"  {text}" for text in (*_threads(of_dtype, head, ours), *_memory(of_dtype)))
        lost = [result["label"] for result in of_dtype if winner_over_us(result)]
        yield f"  shapes where another contender was faster: {'; '.join(lost) or 'none'}"


def _threads(results: list[dict], head: dict, ours: dict) -> Iterator[str]:
    for result in results:
        case = result["case"] | {"threads": head["case"]["threads"]}
        if case == head["case"] and result is not head:
            same = next((o for o in timed(result) if o["name"] == ours["name"]), None)
            if same:
                gain = ours["median_s"] / same["median_s"]
                yield f"{head['case']['threads']} → {result['case']['threads']} threads: {gain:.2f} × as fast"


def _memory(results: list[dict]) -> Iterator[str]:
    weighed = [(r, o) for r in results for o in timed(r) if o["extra_bytes"] is not None]
    if not weighed:
        return
    largest = max(weighed, key=lambda pair: pair[0]["input_bytes"])[0]
    for result, outcome in weighed:
        if result is largest and outcome["objective"] == "gft":
            times = outcome["extra_bytes"] / result["input_bytes"]
            yield f"extra memory at {result['label']}, {outcome['name']}: {times:.2f} × the logits"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.headline", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("results", type=Path)
    saved = report.load(parser.parse_args(argv).results)
    print(f"{saved['machine'].get('gpu') or saved['machine']['cpu']}, commit {saved['commit']['revision'][:12]}")
    print("\n".join(lines(saved)))


if __name__ == "__main__":
    main()
