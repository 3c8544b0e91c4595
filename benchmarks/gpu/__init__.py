"""What needs a GPU, in two profiles of one command each:

    python -m benchmarks.gpu correctness --results FOLDER    build, tests and sanitizers at once; at most 4 minutes
    python -m benchmarks.gpu speed --results FOLDER          build, benchmarks, DRAM traffic; at most 6 minutes

Stages run in order of value (stages.py), each with a reserve of time that no earlier stage can take; what one does not
need is left to the next. A stage that fails, hangs, or whose tool the machine lacks is reported and the next one runs.
Results are written as they arrive, at most 8 files in all: PROFILE.jsonl (provenance, then a line a stage),
gpu-tests.jsonl and oracle-tests.jsonl (lines.py), and the files of the benchmarks, written anew after each case. The
summary is printed last, also where a signal ends the run.

Nothing is downloaded: a build needs nvcc, a C++ compiler, cmake, ninja, pybind11 and setuptools; it is spared where the
module that is there already fits (prebuilt.py, which makes one beforehand as well). `--wheels FOLDER` (or GFT_WHEELS)
unpacks wheels to a folder that only this run sees. `--commit` (or GFT_COMMIT) is what every file names as measured,
where the tree is a copy that git cannot speak for. `--stages a,b` runs some stages. `--stub` rehearses everything
without a GPU (stub.py).
"""
