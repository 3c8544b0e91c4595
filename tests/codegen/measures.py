"""What a compiled kernel is judged by, and the tables all gates print."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.codegen.budget import Budget


@dataclass(frozen=True)
class Measures:
    """Figures of one compiled variant. Loads and stores are those of global memory, counted as instructions.

    Those through a generic address count as global: what the compiler cannot place may lie there.
    """

    registers: int
    stack: int  # bytes a thread; ptxas can say "0 spills" while registers indexed at run time live here
    spills: int
    wide_loads: int  # 16 bytes, to registers or asynchronously to shared memory
    wide_stores: int
    other_loads: int  # narrower
    other_stores: int
    local: int  # instructions that touch local (NVIDIA) or scratch (AMD) memory


@dataclass(frozen=True)
class Limits:
    """What a variant must keep: registers so that it fits, and a 16-byte instruction wherever a row is moved."""

    registers: int
    wide_loads: int = 0
    wide_stores: int = 0

    def broken_by(self, m: Measures) -> list[str]:
        """Each broken limit as a sentence."""
        checks = (
            (m.registers <= self.registers, f"registers must be at most {self.registers}, got {m.registers}"),
            (m.stack == 0, f"the stack must be empty, got {m.stack} bytes"),
            (m.spills == 0, f"registers must not spill, got {m.spills}"),
            (m.local == 0, f"local memory must stay untouched, got {m.local} instructions"),
            (m.wide_loads >= self.wide_loads, f"16-byte loads must be at least {self.wide_loads}, got {m.wide_loads}"),
            (
                m.wide_stores >= self.wide_stores,
                f"16-byte stores must be at least {self.wide_stores}, got {m.wide_stores}",
            ),
        )
        return [sentence for holds, sentence in checks if not holds]


@dataclass(frozen=True)
class Verdict:
    """One line of the table: a variant, what it measured, and what it broke."""

    variant: str
    measures: Measures
    broken: list[str]
    budget: Budget | None = None


COLUMNS = ("registers", "stack", "spills", "wide_loads", "wide_stores", "other_loads", "other_stores", "local")


def print_table(verdicts: Sequence[Verdict]) -> bool:
    """Print the table, the budgets and every broken limit; True if all variants pass."""
    width = max(len(v.variant) for v in verdicts)
    heads = [name.replace("_", " ") for name in COLUMNS]
    print("variant".ljust(width), *heads, sep="  ")
    for v in verdicts:
        cells = [str(getattr(v.measures, name)).rjust(len(head)) for name, head in zip(COLUMNS, heads, strict=True)]
        print(v.variant.ljust(width), *cells, "FAILED" if v.broken else "", sep="  ")
    for v in verdicts:
        if v.budget is not None:
            print(v.variant.ljust(width), v.budget.line(v.variant.split()[0]), sep="  ")
    for v in verdicts:
        for sentence in v.broken:
            print(f"{v.variant}: {sentence}")
    return not any(v.broken for v in verdicts)


def measure_cubin(cubin: bytes, tools: Path) -> tuple[Measures, str]:
    """Figures and code of a cubin that holds one kernel, by `cuobjdump` and `nvdisasm` in the folder `tools`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        sass = _output(tools / "nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    return measure_sass(sass, registers=int(found[1]), stack=int(found[2]), spills=int(found[3])), sass


def measure_sass(sass: str, registers: int, stack: int, spills: int = 0, stored: int = 16) -> Measures:
    """Figures of disassembled NVIDIA code, with those that the disassembly does not tell.

    stored: bytes that the gradient of a vector of logits has, whose stores are the wide ones.
    """
    loads, stores = re.findall(r"\b(?:LDG?|LDGSTS)\.\S*", sass), re.findall(r"\bSTG?\.\S*", sass)
    wide_loads = sum(".128" in op or ".256" in op for op in loads)
    wide_stores = sum(f".{8 * stored}" in op or ".256" in op for op in stores)
    local = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    rest = len(loads) - wide_loads, len(stores) - wide_stores
    return Measures(registers, stack, spills, wide_loads, wide_stores, *rest, local)


def measure_gcn(assembly: str) -> Measures:
    """Figures of AMD assembly, from its own metadata and instructions."""

    def figure(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found, name
        return int(found[1])

    loads = re.findall(r"\b(?:global|buffer|flat)_load_\w+", assembly)
    stores = re.findall(r"\b(?:global|buffer|flat)_store_\w+", assembly)
    wide_loads, wide_stores = (sum(op.endswith("dwordx4") for op in ops) for ops in (loads, stores))
    return Measures(
        registers=figure("vgpr_count"),
        stack=figure("private_segment_fixed_size"),
        spills=figure("vgpr_spill_count"),  # scalar registers spill into vector ones, not to memory
        wide_loads=wide_loads,
        wide_stores=wide_stores,
        other_loads=len(loads) - wide_loads,
        other_stores=len(stores) - wide_stores,
        local=len(re.findall(r"\bscratch_(?:load|store)_\w+", assembly)),
    )


def _output(*command) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout
