"""How kernels are compiled and launched: once for all lengths; by vocabulary, dtype and architecture, never by rows.

A kernel compiled or tuned anew for a batch's length would stall a training run at each new one.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache

import torch
import triton


def compiled_once(function):
    """`triton.jit`, without the variants Triton makes for arguments equal to 1 or divisible by 16.

    Those would recompile a training step whenever a batch has a new remainder. The kernels find alignment themselves,
    at run time (passes.py). Integers carry an annotation, so that a value past 2^31 is no new type either.
    """
    names = [name for name, p in inspect.signature(function).parameters.items() if "constexpr" not in str(p.annotation)]
    return triton.jit(function, do_not_specialize=names, do_not_specialize_on_alignment=names)


@dataclass(frozen=True)
class RowLaunch:
    """A program's: `block` elements a tile, `warps` warps; `registers` bounds a thread's, None: no bound."""

    block: int
    warps: int
    registers: int | None = None

    def __post_init__(self):
        # Triton's blocks are powers of two; 32 elements leave two lanes at 16 two-byte elements a lane.
        assert self.block >= 32 and self.block & (self.block - 1) == 0, self.block
        assert self.warps in (1, 2, 4, 8, 16, 32), self.warps

    def options(self) -> dict[str, int]:
        # A product and a sum are one instruction: Triton 3.9 says that 3.10 will no longer make them so by itself.
        options = {"num_warps": self.warps, "enable_fp_fusion": True}
        return options if self.registers is None else options | {"maxnreg": self.registers}


SMALL_BYTES = 16384
"""Rows below this are finished by 128 threads in one tile or two; more threads would wait for each other."""

SMALL = 4096  # bytes a tile: two 16-byte loads a thread are in flight
LARGE = 16384


COLUMNS = RowLaunch(block=1024, warps=4)
"""Of a sum over rows: 1024 of its columns a program, 8 a thread."""

ROWS = 4  # read at a time: 64 bytes of bfloat16 are under way a thread


def row_launch(vocabulary: int, dtype: torch.dtype, architecture: str, softcapped: bool = False) -> RowLaunch:
    """The launch of every row kernel. `architecture`: "sm_90", "gfx942", ... or "interpreter"."""
    size = dtype.itemsize
    # A softcap's tanh and slope on 16 elements a thread spill on sm_100 (Triton 3.7): there it gets 8.
    large = LARGE // 2 if softcapped and size == 2 and architecture.startswith("sm_10") else LARGE
    if architecture == "interpreter":
        return RowLaunch(block=512, warps=1)
    small = vocabulary * size < SMALL_BYTES
    block = (SMALL if small else large) // size
    if architecture.startswith("gfx"):  # a wavefront has 64 threads
        return RowLaunch(block, warps=2 if small else 8)
    # 65,536 registers on a multiprocessor: 64 a thread let two rows of 512 threads run side by side, so that one
    # reads while the other computes. tests/codegen holds every variant to it without spilling.
    return RowLaunch(block, warps=4) if small else RowLaunch(block, warps=16, registers=64)


@cache
def architecture(device_index: int) -> str:
    """The name of a GPU's instruction set: "sm_90", "gfx942", ..."""
    properties = torch.cuda.get_device_properties(device_index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
