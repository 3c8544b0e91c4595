"""Offline gates: every GPU kernel is compiled without a GPU, and what the compiler made of it is held to account.

`python -m benchmarks.gates` prints one line per kernel variant and fails, naming it, if a variant spills registers,
touches local memory, or moves logits in less than 16 bytes at a time; and if any figure differs from the record.
"""
