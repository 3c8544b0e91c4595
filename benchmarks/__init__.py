"""Measurements: every contender checked against fp64 first, then timed in turns. See benchmarks/README.md."""
