"""The stages of the two profiles, step by step in order of value; the stages of a step run at once.

Reserves are seconds, a step's is the largest of its stages; those of a profile add up to its limit at most.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.gpu import summary, traffic


@dataclass
class Run:
    """Where results go, and whether a stand-in answers for the GPU."""

    results: Path
    scratch: Path
    stub: bool = False
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    def rehearsed(self, name: str, command: list[str]) -> list[str]:
        return python("-m", "benchmarks.gpu.stub", name, *command) if self.stub else command

    def tool(self, name: str) -> str | None:
        """A CUDA tool on the path, in the toolkit, or where the profilers install themselves."""
        folders = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
        folders += map(str, Path("/opt/nvidia").glob("nsight-compute/*"))
        return name if self.stub else shutil.which(name, path=os.pathsep.join(folders))


@dataclass(frozen=True)
class Stage:
    """command: of a run, or the reason why it is skipped. read: what to keep of its output and files."""

    name: str
    reserve_s: float
    command: Callable[[Run], list[str] | str]
    environment: dict[str, str] = field(default_factory=dict)
    read: Callable[[Run, str], dict] = lambda run, output: {}


@dataclass(frozen=True)
class Profile:
    limit_s: float
    steps: tuple[tuple[Stage, ...], ...]


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


FACTS = """
import json, subprocess, torch
from benchmarks import provenance as p
device = "cuda" if torch.cuda.is_available() else "cpu"
query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm,power.draw", "--format=csv,noheader"]
try:
    smi = subprocess.run(query, capture_output=True, text=True, timeout=5).stdout.strip()
except (OSError, subprocess.SubprocessError) as error:
    smi = str(error)
facts = {"machine": p.machine(device), "versions": p.versions(), "commit": p.commit(), "nvidia_smi": smi}
print(json.dumps(facts))
assert device == "cuda", "torch sees no GPU"
"""


def last_json_line(run: Run, output: str) -> dict:
    return json.loads([line for line in output.splitlines() if line.startswith("{")][-1])


ORACLE_TESTS = ("tests/loss/test_loss.py", "tests/loss/test_policy.py", "tests/loss/test_autograd.py",
                "tests/loss/test_advantages.py", "tests/linear/test_linear_gradients.py", "tests/linear/test_linear.py",
                "tests/linear/test_sparse.py")  # fmt: skip
"""Every file whose tests take the device that is asked for; a process each."""


def tests(name: str, *paths: str) -> Stage:
    """Tests that leave NAME.jsonl, two threads to a process, whose neighbours work as well."""

    def command(run: Run) -> list[str]:
        file = str(run.results / f"{name}.jsonl")
        return python("-m", "benchmarks.gpu.lines", file, *paths, "--device", "cuda", "--tb=short")

    def counted(run: Run, output: str) -> dict:
        return {"tests": summary.counts(run.results / f"{name}.jsonl")}

    return Stage(name, 105, command, {"OMP_NUM_THREADS": "2"}, counted)


def sanitizer(tool: str, run: Run) -> list[str] | str:
    """Our kernels only: under a sanitizer torch's own kernels would take the time.

    So initcheck is none of the tools: it would not see torch write what our kernels read. Nor is synccheck: of the
    clusters' barriers it tracks too few, and then ends the launch.
    """
    path = run.tool("compute-sanitizer")
    if path is None:
        return "compute-sanitizer is not on this machine"
    ours = "kns=gft"  # a part of the mangled name: their namespace
    options = ["--tool", tool, "--error-exitcode", "9", "--kernel-name", ours]
    return [path, *options, *python("-m", "benchmarks.gpu.small_calls")]


def profiled(number: int, run: Run) -> list[str] | str:
    path = run.tool("ncu")
    return traffic.command(path, number, python()) if path else "ncu (Nsight Compute) is not on this machine"


def benchmark(file: str, options: str, run: Run) -> list[str]:
    saved = str(run.results / file)
    return python("-m", "benchmarks", *options.split(), "--device", "cuda", "--no-memory", "--save", saved)


UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
"""Every tensor its own cudaMalloc: memcheck knows where each one ends."""
MACHINE = Stage("machine", 30, lambda run: python("-c", FACTS), read=last_json_line)
BUILD = Stage("build", 80, lambda run: python("-m", "benchmarks.gpu.prebuilt"))
PROFILES = {
    "correctness": Profile(240, (
        (MACHINE,),
        (BUILD,),
        (Stage("calls", 25, lambda run: python("-m", "benchmarks.gpu.small_calls")),),
        (
            tests("gpu-tests", "tests/backends/gpu"),
            tests("oracle-tests", *ORACLE_TESTS),
            *(Stage(tool, 105, partial(sanitizer, tool), UNCACHED) for tool in ("memcheck", "racecheck")),
        ),
    )),
    "speed": Profile(360, (
        (MACHINE,),
        (BUILD,),
        (Stage("row", 80, partial(benchmark, "row.json", "--sweep gpu --rounds 7 --skip reference")),),
        (Stage("linear", 75, partial(benchmark, "linear.json",
                                     "--sweep gpu-linear --rounds 5 --skip reference --skip compile")),),
        (Stage("small", 25, partial(benchmark, "small.json",
                                    "--sweep gpu-small --graph --rounds 11 --skip compile --skip reference")),),
        *((Stage(f"traffic-{number}", 25, partial(profiled, number), read=partial(traffic.read, number)),)
          for number in range(len(traffic.CASES))),
        (Stage("machine-after", 15, lambda run: python("-c", FACTS), read=last_json_line),),
    )),
}  # fmt: skip
