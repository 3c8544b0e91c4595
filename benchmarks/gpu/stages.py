"""The stages of a run on a GPU. Each is a program with a time limit of its own, and none can stop the next."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu import profiler

ROOT = Path(__file__).parents[2]
KEPT_CHARACTERS = 6000  # of a program's output, in the JSON


@dataclass
class Run:
    """Where results go, and how much time is left."""

    results: Path
    scratch: Path
    limit: float
    started: float = field(default_factory=time.monotonic)
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    def remaining(self) -> float:
        return self.limit - (time.monotonic() - self.started)


@dataclass(frozen=True)
class StageResult:
    """outcome: passed, failed, out of time, or skipped (the machine lacks something)."""

    name: str
    outcome: str
    seconds: float
    why: str = ""
    output: str = ""


def program(run: Run, name: str, command: list[str], limit: float, **environment: str) -> StageResult:
    """Run a program in the repository's root; past its limit it is ended with all it has started."""
    started = time.monotonic()
    limit = max(1.0, min(limit, run.remaining()))
    log = run.scratch / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**run.environment, **environment}, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(limit)
            outcome, why = ("passed", "") if status == 0 else ("failed", f"exit status {status}")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            outcome, why = "out of time", f"ended after {limit:.0f} s"
    text = log.read_text(errors="replace")
    return StageResult(name, outcome, time.monotonic() - started, why, text[-KEPT_CHARACTERS:])


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def wheels(run: Run, folder: Path) -> StageResult:
    """Unpack wheels where only this run looks."""
    site = run.scratch / "site"
    pip = python("-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target", str(site))
    result = program(run, "wheels", [*pip, *map(str, sorted(Path(folder).glob("*.whl")))], 60)
    run.environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), run.environment.get("PYTHONPATH")]))
    return result


def build(run: Run) -> StageResult:
    """The extension with its CUDA kernels, beside the sources: nothing is installed."""
    return program(run, "build", python("setup.py", "build_ext", "--inplace"), 180, GFT_BUILD="cuda")


def tests(run: Run) -> StageResult:
    """The whole suite, with the backends on the GPU."""
    report = run.scratch / "tests.xml"
    workers = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    command = python("-m", "pytest", "tests", "--device", "cuda", "--tb=short", f"--junitxml={report}", *workers)
    result = program(run, "tests", command, 180)
    save(run, "tests.json", {"outcome": result.outcome, **read_junit(report), "output": result.output})
    return result


def read_junit(report: Path) -> dict:
    """Counts, skip reasons and failures of a pytest report; empty if pytest never wrote one."""
    if not report.exists():
        return {}
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    failures, skips = [], {}
    for suite in suites:
        for key in counts:
            counts[key] += int(suite.get(key, 0))
        for case in suite.iter("testcase"):
            for fault in [*case.findall("failure"), *case.findall("error")]:
                name = f"{case.get('classname')}::{case.get('name')}"
                failures.append({"test": name, "message": (fault.text or fault.get("message", ""))[-2000:]})
            for skip in case.findall("skipped"):
                reason = skip.get("message", "")
                skips[reason] = skips.get(reason, 0) + 1
    return {**counts, "failed": failures[:200], "skip_reasons": skips}


SANITIZERS = ("memcheck", "racecheck", "initcheck")


def sanitizers(run: Run) -> StageResult:
    """compute-sanitizer over small calls of every kernel."""
    tool = find_tool("compute-sanitizer")
    if tool is None:
        return StageResult("sanitizers", "skipped", 0.0, "compute-sanitizer is not on this machine")
    reports = []
    for name in SANITIZERS:
        command = [tool, "--tool", name, "--error-exitcode", "9", *python("-m", "benchmarks.gpu.small_calls")]
        # every tensor its own cudaMalloc, so that memcheck knows where each one ends
        reports.append(program(run, name, command, 45, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))
        save(run, "sanitizers.json", {report.name: vars(report) for report in reports})
    return combined("sanitizers", reports)


def traffic(run: Run) -> StageResult:
    """DRAM bytes of the row kernels against the traffic model."""
    tool = find_tool("ncu")
    if tool is None:
        return StageResult("traffic", "skipped", 0.0, "ncu (Nsight Compute) is not on this machine")
    result = program(run, "traffic", profiler.command(tool, python("-m", "benchmarks.gpu.one_call")), 75)
    measured = profiler.read((run.scratch / "traffic.log").read_text(errors="replace"))
    save(run, "traffic.json", {"outcome": result.outcome, "measured": measured, "output": result.output})
    return result


def benchmark(name: str, kind: str, limit: float, *options: str) -> Callable[[Run], StageResult]:
    """Some of the benchmarks, saved as NAME.json."""

    def stage(run: Run) -> StageResult:
        saved = run.results / f"{name}.json"
        command = python("-m", "benchmarks", kind, "--device", "cuda", *options, "--save", str(saved))
        return program(run, name, command, limit)

    return stage


STAGES: dict[str, Callable[[Run], StageResult]] = {
    "build": build,
    "tests": tests,
    "sanitizers": sanitizers,
    "traffic": traffic,
    "row-quick": benchmark("row-quick", "row", 90, "--quick"),
    "linear": benchmark("linear", "linear", 80, "--quick"),
    "row": benchmark("row", "row", 300, "--rounds", "5", "--no-memory"),
}
"""In the order they run: right before fast; the long grid takes what time is left, and saves after each case."""


def combined(name: str, parts: list[StageResult]) -> StageResult:
    worst = next((part.outcome for part in parts if part.outcome != "passed"), "passed")
    why = "; ".join(f"{part.name}: {part.outcome} {part.why}".strip() for part in parts)
    return StageResult(name, worst, sum(part.seconds for part in parts), why)


def find_tool(name: str) -> str | None:
    """A CUDA tool on the path, in the toolkit, or where the profilers install themselves."""
    folders = [
        os.environ.get("PATH", ""),
        "/usr/local/cuda/bin",
        *map(str, Path("/opt/nvidia").glob("nsight-compute/*")),
    ]
    return shutil.which(name, path=os.pathsep.join(folders))


def save(run: Run, name: str, content: dict) -> None:
    (run.results / name).write_text(json.dumps({**provenance(run), **content}, indent=1) + "\n")


def provenance(run: Run) -> dict:
    """Machine, commit and versions, asked for in a process of its own (the answer needs torch and a GPU)."""
    return _provenance(sys.executable, run.environment.get("PYTHONPATH", ""))


@functools.lru_cache(maxsize=2)
def _provenance(executable: str, path: str) -> dict:
    text = (
        "import json, torch; from benchmarks import provenance as p; "
        "d = 'cuda' if torch.cuda.is_available() else 'cpu'; "
        "print(json.dumps({'machine': p.machine(d), 'commit': p.commit(), 'versions': p.versions()}))"
    )
    done = subprocess.run(
        [executable, "-c", text], cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    return json.loads(done.stdout) if done.returncode == 0 else {"provenance_failed": done.stderr[-1000:]}
