"""Instructions an element of the CPU row kernels: a guard that no load of the machine can blur.

`python -m benchmarks.instructions` counts them under valgrind's callgrind and compares with the committed counts.txt.
"""
