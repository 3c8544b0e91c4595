"""`python -m tests.codegen [triton] [cuda] [instructions] [sm_90 ...]`: what compilers make of kernels, within limits.

Registers, stack, spills and the width of loads and stores of every GPU kernel, compiled without a GPU; instructions an
element of the CPU kernels. What this machine has no compiler for is skipped with a sentence.
"""

from __future__ import annotations

import argparse
import sys
import time
from types import ModuleType

from tests.codegen import cuda_gate, instructions, triton_gate
from tests.codegen.measures import print_table

GATES = {"triton": triton_gate, "cuda": cuda_gate}
CHECKS = (*GATES, "instructions")


def run(name: str, gate: ModuleType, wanted: list[str]) -> bool:
    """Print a gate's table, or the sentence why it is skipped; False if a variant failed."""
    targets = tuple(target for target in gate.TARGETS if not wanted or target in wanted)
    if (reason := gate.absent()) is not None:
        print(f"{name} gate skipped: {reason}")
        return True
    started = time.perf_counter()
    verdicts = gate.gate(targets)
    passed = not verdicts or print_table(verdicts)
    seconds = time.perf_counter() - started
    print(f"{name}, {gate.compiler()}: {len(verdicts)} variants in {seconds:.0f} s: {'pass' if passed else 'FAILED'}")
    return passed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.codegen", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    every = dict.fromkeys(target for gate in GATES.values() for target in gate.TARGETS)
    known = [*CHECKS, *every]
    parser.add_argument("what", nargs="*", metavar="what", help=", ".join(known))
    what = parser.parse_args(argv).what
    if unknown := [name for name in what if name not in known]:
        parser.error(f"what must be among {', '.join(known)}, got {unknown[0]}")
    checks = [name for name in CHECKS if name in what] or list(CHECKS)
    targets = [name for name in what if name in every]
    passed = [run(name, GATES[name], targets) for name in checks if name in GATES]
    if "instructions" in checks:
        passed.append(instructions.check())
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
