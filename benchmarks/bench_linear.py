"""Loss and gradients over hidden states and output head, against three bare products and everyone else.

python -m benchmarks.bench_linear [--quick] [--device cpu|cuda] [--threads 1] [--only NAME] [--save FILE]
"""

from __future__ import annotations

from benchmarks import shapes
from benchmarks.runner import arguments, run


def main(argv: list[str] | None = None) -> None:
    options = arguments("benchmarks.bench_linear", __doc__, argv)
    timed = shapes.linear_cases(options.device, quick=options.quick, threads=options.threads)
    run("linear", timed, timed, options)


if __name__ == "__main__":
    main()
