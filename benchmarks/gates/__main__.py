"""`python -m benchmarks.gates [target ...] [--accept]`: run every gate this machine has the compilers for.

--accept: write the record of what the compilers made of the kernels (compiled.txt) instead of comparing with it.
"""

import argparse
import sys
import time
from types import ModuleType

from benchmarks.gates import cuda_gate, record, triton_gate
from benchmarks.gates.measures import print_table

GATES = {"Triton": triton_gate, "CUDA": cuda_gate}


def run(name: str, gate: ModuleType, wanted: list[str], accept: bool) -> bool:
    """Print a gate's table, or the sentence why it is skipped; False if a variant failed or the record differs."""
    targets = tuple(target for target in gate.TARGETS if not wanted or target in wanted)
    if (reason := gate.absent()) is not None:
        print(f"{name} gate skipped: {reason}")
        return True
    started = time.perf_counter()
    verdicts = gate.gate(targets)
    passed = print_table(verdicts)
    if accept:
        record.accept(name, gate.compiler(), verdicts)
    else:
        passed = as_recorded(name, gate, verdicts) and passed
    seconds = time.perf_counter() - started
    print(f"{name}: {len(verdicts)} variants in {seconds:.0f} s: {'all pass' if passed else 'FAILED'}")
    return passed


def as_recorded(name: str, gate: ModuleType, verdicts: list) -> bool:
    """Print how this build differs from the record; False if it does, and by the record's own compiler."""
    diff, counts = record.differences(name, gate.compiler(), verdicts)
    if not diff:
        return True
    print(diff)
    if not counts:
        print(f"{name}: the record was made by another compiler than {gate.compiler()}, so differences do not count")
        return True
    print(f"{name}: the compiled code has changed; if that is meant, python -m benchmarks.gates --accept, and commit")
    return False


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gates", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("targets", nargs="*", metavar="target", help=", ".join(triton_gate.TARGETS))
    parser.add_argument("--accept", action="store_true")
    options = parser.parse_args(argv)
    if options.accept and options.targets:
        parser.error("--accept writes the record of all targets; leave the targets out")
    passed = [run(name, gate, options.targets, options.accept) for name, gate in GATES.items()]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
