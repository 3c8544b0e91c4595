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

from tests.codegen import budget
from tests.codegen.measures import Limits, Verdict, measure_sass

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120")
CSRC = Path(__file__).parents[2] / "csrc"
SOURCE = CSRC / "cuda" / "launch.cu"
DTYPES = {
    "f": "float32",
    "NS0_4Bf16E": "bfloat16",
    "NS0_3F16E": "float16",
    "NS0_9RoundedToINS0_4Bf16EEE": "float32-to-bfloat16",
    "NS0_9RoundedToINS0_3F16EEE": "float32-to-float16",
}

# Two blocks of 512 threads, or one of 1024, have 64 registers a thread; three of 384, or four of 256 and more, 56.
ROW_REGISTERS, CLUSTER_REGISTERS = 64, 56
# 16-byte moves in each kernel's text: cluster_row copies asynchronously two vectors a trip, one behind it and one where
# it has to look, and stores as often, and zeros; two_pass_row loads three vectors ahead in each of its passes, and
# stores them where it need not look, where it has to, and zeros.
ROW_LIMITS = {
    "cluster_row": Limits(CLUSTER_REGISTERS, wide_loads=3, wide_stores=4),
    "two_pass_row": Limits(ROW_REGISTERS, wide_loads=6, wide_stores=7),
    "observe_shard_row": Limits(ROW_REGISTERS, wide_loads=3),
    "shade_shard_row": Limits(ROW_REGISTERS, wide_loads=3, wide_stores=4),
    "scale_row": Limits(ROW_REGISTERS, wide_loads=3, wide_stores=3),
    # Blocks of 256 threads, a warp a response, and sums in doubles: three of them on a multiprocessor are plenty.
    "advantages_of_rewards": Limits(registers=80),
}
# Instructions an element, row path included (budget.py). In bfloat16 an H200 has 24.7 of them while its memory moves an
# element, a B200 17.5: two thirds and six sevenths of that, so that memory is what a row waits for. fp32 has twice the
# time. An RTX 5090 leaves 117 and 234: a quarter of those is no bound to reach, but one that a loop breaks which has
# been taken apart. No fence in a loop: one for the whole GPU waits for every store under way.
BUDGETS = {
    ("sm_90", 2): 16.5,
    ("sm_90", 4): 20.0,
    ("sm_100", 2): 15.0,
    ("sm_100", 4): 18.5,
    ("sm_120", 2): 29.0,
    ("sm_120", 4): 58.0,
}
CREDIT_LIMITS = Limits(registers=64)  # one block of 1024 threads, or four of 256


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
        u, name = usage[symbol], readable(symbol)
        measures = measure_sass(sass[symbol], u.registers, u.stack, u.spills, stored(name))
        broken = ROW_LIMITS.get(name.split()[0], CREDIT_LIMITS).broken_by(measures)
        spent = spending(target, name, sass[symbol])
        verdicts.append(Verdict(f"{target} {name}", measures, broken + overspent(target, name, spent), spent))
    return verdicts


def spending(target: str, name: str, sass: str) -> budget.Budget | None:
    """Instructions an element of a row kernel without entropy; None of others, and where no cluster holds the row."""
    kernel, *parameters = name.split()
    if kernel not in budget.KERNELS or "entropy" in parameters:
        return None
    item = 4 if parameters[0].startswith("float32") else 2
    if kernel == "cluster_row" and (target, item) not in BUDGETS:
        return None
    return budget.measure(kernel, sass, item, target, stored(name))


def stored(name: str) -> int:
    """Bytes of the gradient of 16 bytes of logits."""
    return 8 if "-to-" in name else 16


def overspent(target: str, name: str, spent: budget.Budget | None) -> list[str]:
    """What breaks the limits of cluster_row, as sentences."""
    limit = BUDGETS.get((target, spent.item)) if spent and name.startswith("cluster_row") else None
    if spent is None or limit is None:
        return []
    sentences = [f"instructions an element must be at most {limit:g}, got {spent.total:.2f}"] * (spent.total > limit)
    sentences += [f"special functions an element must be at most 2, got {spent.mufu:.2f}"] * (spent.mufu > 2)
    return sentences + [f"no loop may hold a fence, got {spent.fences} of them"] * (spent.fences > 0)


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
    parameters = re.match(rf"I({'|'.join(DTYPES)})(?:Lb([01])E)?E", rest)
    if parameters is None:
        return name
    return " ".join([name, DTYPES[parameters[1]], *(["entropy"] if parameters[2] == "1" else [])])


def output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{Path(command[0]).name} must succeed, got exit status {done.returncode}:\n{done.stderr}")
    return done.stdout + done.stderr
