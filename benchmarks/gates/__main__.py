"""`python -m benchmarks.gates [target ...]`: run every gate this machine has the compilers for."""

import sys
import time
from types import ModuleType

from benchmarks.gates import cuda_gate, triton_gate
from benchmarks.gates.measures import print_table

GATES = {"Triton": triton_gate, "CUDA": cuda_gate}


def run(name: str, gate: ModuleType, wanted: list[str]) -> bool:
    """Print a gate's table, or the sentence why it is skipped; False if a variant failed."""
    targets = tuple(target for target in gate.TARGETS if not wanted or target in wanted)
    if (reason := gate.absent()) is not None:
        print(f"{name} gate skipped: {reason}")
        return True
    started = time.perf_counter()
    verdicts = gate.gate(targets)
    passed = print_table(verdicts)
    seconds = time.perf_counter() - started
    print(f"{name}: {len(verdicts)} variants in {seconds:.0f} s: {'all pass' if passed else 'FAILED'}")
    return passed


def main(targets: list[str]) -> int:
    passed = [run(name, gate, targets) for name, gate in GATES.items()]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
