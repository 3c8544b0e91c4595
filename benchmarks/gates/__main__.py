"""`python -m benchmarks.gates [target ...]`: run every gate this machine has the compilers for."""

import sys
import time

from benchmarks.gates import triton_gate
from benchmarks.gates.measures import print_table


def main(targets: list[str]) -> int:
    reason = triton_gate.absent()
    if reason is not None:
        print(f"Triton gate skipped: {reason}")
        return 0
    started = time.perf_counter()
    verdicts = triton_gate.gate(tuple(targets) or tuple(triton_gate.TARGETS))
    passed = print_table(verdicts)
    print(f"{len(verdicts)} variants in {time.perf_counter() - started:.0f} s: {'all pass' if passed else 'FAILED'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
