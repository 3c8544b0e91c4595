"""The committed results, and how each is made: `python -m benchmarks.committed [FILE.json ...]` makes them anew.

Then the plots are drawn from the files and the figures on all pages rewritten (tests/project/figures.py): what is left
to do is to read whether the words around the figures still hold. Files about memory need no quiet machine, others do.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from benchmarks import plots

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

COMMANDS = {
    "row-cpu.json": 'row --case "128 × 151936" --rounds 5',
    "linear-cpu.json": 'linear --threads 2 --case "512 × 896 × 151936 float32" --only "gft_linear_loss cpu" --rounds 3',
    "linear-peers-cpu.json": 'linear --threads 2 --case "512 × 896 × 151936 float32, 2 threads" --rounds 2',
    "quick-cpu.json": "--quick",
    "row-vocabulary-cpu.json": "--sweep vocabulary --case float32 --rounds 3 --skip reference",
    "linear-live-cpu.json": "--sweep live --threads 2 --rounds 3 --skip reference --skip chunked --skip Liger",
    "row-memory-cpu.json": "--sweep memory --case float32 --rounds 1",
    "step-memory-cpu.json": "step --quick --budget 256 --rounds 1 --skip compile --skip F.linear --skip Liger",
}
"""By file: the options of gft bench."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.committed", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("files", nargs="*", metavar="FILE.json", help=f"{', '.join(COMMANDS)}; default: all")
    files = parser.parse_args(argv).files or list(COMMANDS)
    for file in files:
        if file not in COMMANDS:
            parser.error(f"FILE must be one of {', '.join(COMMANDS)}, got {file!r}")
    for file in files:
        save = (RESULTS / file).relative_to(ROOT)  # the file keeps the command: no path of this machine
        subprocess.run(
            [sys.executable, "-m", "benchmarks", *shlex.split(COMMANDS[file]), "--save", save], cwd=ROOT, check=True
        )
    for plot in plots.draw(sorted(RESULTS.glob("*.json")), plots.FIGURES):
        print(plot.relative_to(ROOT))
    subprocess.run([sys.executable, "tests/project/figures.py"], cwd=ROOT, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
