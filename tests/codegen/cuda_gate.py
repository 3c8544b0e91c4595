"""Compile every CUDA kernel for every target without a GPU and measure the result."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.codegen.measures import Limits, Verdict, measure_sass

TARGETS = ("sm_80", "sm_90", "sm_100")
CSRC = Path(__file__).parents[2] / "csrc"
SOURCE = CSRC / "cuda" / "launch.cu"
DTYPES = {"f": "float32", "NS0_4Bf16E": "bfloat16", "NS0_3F16E": "float16"}

# Two blocks of 512 threads, or one of 1024, have 64 registers a thread.
ROW_REGISTERS = 64
# 16-byte moves in each kernel's text: cluster_row has one asynchronous copy and, for a gradient and for zeros, two
# stores; two_pass_row loads three vectors ahead in each of its passes.
ROW_LIMITS = {
    "cluster_row": Limits(ROW_REGISTERS, wide_loads=1, wide_stores=2),
    "two_pass_row": Limits(ROW_REGISTERS, wide_loads=6, wide_stores=4),
    "observe_shard_row": Limits(ROW_REGISTERS, wide_loads=3),
    "shade_shard_row": Limits(ROW_REGISTERS, wide_loads=3, wide_stores=4),
    "scale_row": Limits(ROW_REGISTERS, wide_loads=3, wide_stores=3),
}
CREDIT_LIMITS = Limits(registers=64)


@dataclass(frozen=True)
class Usage:
    """What ptxas reports of a kernel."""

    registers: int
    stack: int
    spills: int  # bytes, stored and loaded


def absent() -> str | None:
    """Why this machine cannot run the gate, as a sentence; None if it can."""
    if shutil.which("nvcc") is None:
        return "nvcc is not on the PATH"
    if disassembler() is None:
        return "nvdisasm is neither on the PATH nor in an installed triton"
    return None


def compiler() -> str:
    """nvcc's release."""
    found = re.search(r"release [\d.]+, V([\d.]+)", output(["nvcc", "--version"]))
    return f"nvcc {found[1]}" if found else "nvcc of an unknown version"


def disassembler() -> str | None:
    """nvdisasm of the toolkit, or the one that triton's wheel carries."""
    if (found := shutil.which("nvdisasm")) is not None:
        return found
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    carried = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return str(carried) if carried.exists() else None


def gate(targets: tuple[str, ...] = TARGETS) -> list[Verdict]:
    """Compile and judge all kernels, two targets at a time."""
    with ThreadPoolExecutor(2) as pool:
        return [verdict for verdicts in pool.map(judge, targets) for verdict in verdicts]


def judge(target: str, source: Path = SOURCE) -> list[Verdict]:
    """One verdict per kernel variant of a target."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = ["nvcc", "-cubin", f"-arch={target}", "-O3", "-std=c++17", "-Xptxas=-v", f"-I{CSRC}"]
        report = output([*command, str(source), "-o", str(cubin)])
        sass = sections(output([str(disassembler()), "-c", str(cubin)]))
    usage = usages(report)
    assert usage.keys() == sass.keys(), "ptxas and nvdisasm must name the same kernels"
    verdicts = []
    for symbol in sorted(usage, key=readable):
        u = usage[symbol]
        measures = measure_sass(sass[symbol], u.registers, u.stack, u.spills)
        limits = ROW_LIMITS.get(readable(symbol).split()[0], CREDIT_LIMITS)
        verdicts.append(Verdict(f"{target} {readable(symbol)}", measures, limits.broken_by(measures)))
    return verdicts


def usages(report: str) -> dict[str, Usage]:
    """ptxas's report, by mangled name."""
    found = re.findall(
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    return {name: Usage(int(regs), int(stack), int(out) + int(back)) for name, stack, out, back, regs in found}


def sections(sass: str) -> dict[str, str]:
    """Disassembly, by mangled name."""
    parts = re.split(r"^\s*\.section\s+\.text\.(\S+?),.*$", sass, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def readable(symbol: str) -> str:
    """`cluster_row bfloat16 entropy` for the mangled name of cluster_row<Bf16, true>."""
    words = re.match(r"_ZN3gft4cuda(?:\d+_GLOBAL__N__\w*?)?(\d+)(\w+)", symbol)
    assert words, symbol
    name, rest = words[2][: int(words[1])], words[2][int(words[1]) :]
    parameters = re.match(r"I(f|NS0_4Bf16E|NS0_3F16E)(?:Lb([01])E)?E", rest)
    if parameters is None:
        return name
    return " ".join([name, DTYPES[parameters[1]], *(["entropy"] if parameters[2] == "1" else [])])


def output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{Path(command[0]).name} must succeed, got exit status {done.returncode}:\n{done.stderr}")
    return done.stdout + done.stderr
