"""Loss and gradient at a vocabulary of 151,936, ours against eager PyTorch: `python -m benchmarks.demo_table`.

Through the public `gft_loss` on the CPU with one thread, answers checked against fp64 first. Under a minute.
"""

from __future__ import annotations

import torch

from benchmarks import provenance, report, shapes
from benchmarks.clocks import CpuClock
from benchmarks.harness import Outcome, measure
from benchmarks.memory import NotMeasuredError, peak_extra_bytes
from benchmarks.peers import ours_name, row_contender
from benchmarks.row_problem import build_row_problem

OURS, EAGER = ours_name("auto", inplace=True), "eager PyTorch, lean"


def compared(case: shapes.RowCase, rounds: int = 7) -> tuple[Outcome, Outcome]:
    """Our outcome and eager PyTorch's, timed in turns."""
    problem = build_row_problem(case)
    contenders = [row_contender(problem, name) for name in (OURS, EAGER)]
    outcomes = {outcome.name: outcome for outcome in measure(problem, contenders, CpuClock(cold=True), rounds=rounds)}
    return outcomes[OURS], outcomes[EAGER]


def line(case: shapes.RowCase) -> str:
    ours, eager = compared(case)
    untimed = [outcome for outcome in (ours, eager) if outcome.status != "timed"]
    if untimed:
        return f"{case.dtype:<10}" + "; ".join(f"{o.name}: {o.status}: {o.why}" for o in untimed)
    mib = [_mib(case, name) for name in (OURS, EAGER)]
    times = f"{ours.median_s * 1e3:8.1f} ms {eager.median_s * 1e3:8.1f} ms {eager.median_s / ours.median_s:6.1f} ×"
    return f"{case.dtype:<10}{times}{mib[0]:>12}{mib[1]:>12}{ours.error:10.0e}{eager.error:9.0e}"


def _mib(case: shapes.RowCase, name: str) -> str:
    try:
        return f"{peak_extra_bytes('row', case, name) / 2**20:.1f} MiB"
    except NotMeasuredError:  # a system without /proc
        return "not known"


def main() -> None:
    provenance.restart_under_headline_allocator("benchmarks.demo_table")
    torch.set_num_threads(1)
    head = shapes.RowCase(64, shapes.HEADLINE_VOCABULARY)
    print(f"Loss and gradient, {head.rows} tokens × {head.vocab} vocabulary, one thread")
    print(report.header("cpu", "medians, cold cache", provenance.commit(), provenance.load_average()) + "\n")
    print("             gft_loss       eager  faster   gft_loss       eager   gft_loss   eager")
    print("              time                          extra memory            error against fp64")
    for dtype in ("float32", "bfloat16"):
        print(line(shapes.RowCase(head.rows, head.vocab, dtype)), flush=True)


if __name__ == "__main__":
    main()
