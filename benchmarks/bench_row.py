"""Loss and gradient over logits, against the floor and against everyone else.

python -m benchmarks.bench_row [--quick] [--device cpu|cuda] [--threads 1] [--only NAME] [--save FILE]
"""

from __future__ import annotations

from benchmarks import shapes
from benchmarks.runner import arguments, run


def main(argv: list[str] | None = None) -> None:
    options = arguments("benchmarks.bench_row", __doc__, argv)
    timed = shapes.row_cases(options.device, quick=options.quick, threads=options.threads)
    weighed = shapes.memory_cases(options.device, quick=options.quick)
    run("row", timed, weighed, options)


if __name__ == "__main__":
    main()
