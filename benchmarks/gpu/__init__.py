"""Everything that needs a GPU, in one command: build, tests, sanitizers, memory traffic, benchmarks.

`python -m benchmarks.gpu --results FOLDER` runs the stages of stages.py on the machine it is started on, each under its
own time limit and all of them in less than ten minutes, and writes at most 8 JSON files into FOLDER:

    run.json         machine, commit, versions, and how each stage ended
    tests.json       outcome of `pytest tests --device cuda`, every failure with its message
    sanitizers.json  compute-sanitizer memcheck, racecheck and initcheck over small calls
    traffic.json     bytes the row kernels moved through DRAM (Nsight Compute) beside the traffic model
    row.json, row-quick.json, linear.json   benchmarks (benchmarks/README.md)

A stage that fails, or whose tool the machine lacks, is reported and the next one runs. Nothing is downloaded: the build
needs nvcc, a C++ compiler, cmake, ninja, pybind11 and setuptools in the present environment. What is missing there can
be brought along as wheels: `--wheels FOLDER` (or GFT_WHEELS=FOLDER) unpacks them to a folder that only this run sees.
Where the tree is no git checkout, `--commit TEXT` says what was measured. `--stages build,tests` runs some of them.
"""
