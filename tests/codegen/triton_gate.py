"""Compile every Triton kernel for every target without a GPU and measure the result."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.codegen import budget
from tests.codegen.measures import Limits, Measures, Verdict, measure_cubin, measure_gcn

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TRITON_NAMES = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
LARGE, SMALL = 151936, 1000  # one vocabulary per launch configuration

POINTERS = {
    "targets_R": "*i64",
    "live_R": "*u8",
    "read_R": "*u8",
}
"""Pointers that are neither logits (their dtype varies) nor float32 (the rest)."""
LOGITS = ("logits", "gradient", "scaled")
WRITTEN = {"row_loss": "gradient", "scale_rows": "scaled", "shard_gradient": "gradient"}

# How many blocks of a row each kernel's text loads and stores: a tile and a tail in each walk, and the walk that maps
# a row exists once for targets aligned with their source and once for others, whose stores are narrow.
# Where sizes are taken, rows of the buffer begin aligned: a tile has vectors, its masked tail need not.
BLOCKS_LOADED = {"row_loss": 6, "scale_rows": 4, "shard_statistics": 2, "shard_gradient": 4}
BLOCKS_LOADED |= {"row_sizes": 1, "group_sums": 1}
BLOCKS_STORED = {"row_loss": 4, "scale_rows": 2, "shard_gradient": 4}


# Instructions an element at V = 151936: 7 % above what Triton 3.7 makes. Three passes over bfloat16 leave 57 on an
# A100, 53 on an H100 and 37 on an H200; on a B200 they leave 26, and there it is instructions that a row waits for.
INSTRUCTIONS = 36.0


@dataclass(frozen=True)
class Variant:
    """A kernel as compiled for one target; `constants` are its compile-time arguments besides BLOCK."""

    kernel: str
    target: str
    dtype: str
    vocabulary: int
    constants: tuple[tuple[str, object], ...] = ()
    into: str = ""  # the dtype of what is written, where it is another

    @property
    def name(self) -> str:
        constants = (f"{k}={v}" for k, v in self.constants)
        dtype = f"{self.dtype}-to-{self.into}" if self.into else self.dtype
        return " ".join([self.target, self.kernel, f"V={self.vocabulary}", dtype, *constants])


def absent() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    return None


def compiler() -> str:
    return f"Triton {importlib.metadata.version('triton')}"


def variants(targets=tuple(TARGETS)) -> Iterator[Variant]:
    """Every kernel on every target; dtypes and options where they change the code."""
    plain = (("SOFTCAP", 0.0), ("ENTROPY", False))
    full = (("SOFTCAP", 30.0), ("ENTROPY", True))
    for target in targets:
        for dtype in DTYPES:
            yield Variant("row_loss", target, dtype, LARGE, plain)
        for dtype in ("float32", "bfloat16"):  # float16 differs from bfloat16 in two conversions
            yield Variant("row_loss", target, dtype, LARGE, full)
            yield Variant("row_loss", target, dtype, SMALL, full)
            yield Variant("scale_rows", target, dtype, LARGE)
            yield Variant("shard_statistics", target, dtype, LARGE, full)
            yield Variant("shard_gradient", target, dtype, LARGE, plain)
            yield Variant("shard_gradient", target, dtype, LARGE, full)
        for constants in (plain, full):
            yield Variant("row_loss", target, "float32", LARGE, constants, "bfloat16")
        yield Variant("scale_rows", target, "float32", LARGE, (), "bfloat16")
        for dtype in ("float32", "bfloat16"):
            yield Variant("row_sizes", target, dtype, LARGE)
            for squared in (False, True):
                yield Variant("group_sums", target, dtype, LARGE, (("SQUARED", squared),))
        yield Variant("shard_gradient", target, "float32", LARGE, full, "bfloat16")


def gate(targets=tuple(TARGETS), workers: int = 0) -> list[Verdict]:
    """Compile and judge all variants, in two processes unless told otherwise."""
    chosen = list(variants(targets))
    with ProcessPoolExecutor(workers or min(2, os.cpu_count() or 1)) as pool:
        return list(pool.map(judge, chosen))


def judge(variant: Variant) -> Verdict:
    kernel, constants, options = recipe(variant)
    measures, sass = compile_and_measure(kernel, variant, constants, options)
    broken = limits(variant, constants, options).broken_by(measures)
    spent = spending(variant, sass)
    if spent is not None and spent.total > INSTRUCTIONS:
        broken = [*broken, f"instructions an element must be at most {INSTRUCTIONS:g}, got {spent.total:.2f}"]
    return Verdict(variant.name, measures, broken, spent)


def spending(variant: Variant, sass: str) -> budget.Budget | None:
    """Instructions an element of the row kernel, on a long row and without entropy; None of any other, and on AMD.

    None where two vectors of logits are one of their gradient, either: a trip is known by one store a load.
    """
    if variant.kernel not in budget.KERNELS or variant.vocabulary != LARGE or dict(variant.constants)["ENTROPY"]:
        return None
    if variant.into:
        return None
    return budget.measure(variant.kernel, sass, DTYPES[variant.dtype].itemsize, variant.target) if sass else None


def recipe(variant: Variant) -> tuple[object, dict[str, object], dict[str, int]]:
    """The kernel, its compile-time arguments and its launch options, as the library would choose them."""
    from gft_kernels.triton_kernels import launch, measures, row_loss, scale_rows, shard

    home = {"row_loss": row_loss, "scale_rows": scale_rows, "shard_statistics": shard, "shard_gradient": shard}
    kernel = getattr(home.get(variant.kernel, measures), f"{variant.kernel}_kernel")
    constants = dict(variant.constants)
    if variant.kernel == "group_sums":
        return kernel, {**constants, "BLOCK": launch.COLUMNS.block, "ROWS": launch.ROWS}, launch.COLUMNS.options()
    softcapped = constants.get("SOFTCAP", 0.0) != 0.0
    chosen = launch.row_launch(variant.vocabulary, DTYPES[variant.dtype], variant.target, softcapped)
    return kernel, {**constants, "BLOCK": chosen.block}, chosen.options()


def compile_and_measure(
    kernel, variant: Variant, constants: dict[str, object], options: dict[str, int]
) -> tuple[Measures, str]:
    """Figures, and NVIDIA's machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [parameter.name for parameter in kernel.params]
    source = ASTSource(
        fn=kernel,
        signature={parameter.name: argument_type(parameter, variant) for parameter in kernel.params},
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[variant.target]), options=options)
    if variant.target.startswith("gfx"):
        return measure_gcn(compiled.asm["amdgcn"]), ""
    return measure_cubin(compiled.asm["cubin"], Path(triton.__file__).parent / "backends" / "nvidia" / "bin")


SPELLED_OUT = {"triton.language.float32": "fp32"}  # an annotation that Triton 3.3 has no short name for


def argument_type(parameter, variant: Variant) -> str:
    """Triton's name for a kernel argument's type: from its annotation, or what it points to."""
    if parameter.is_constexpr:
        return "constexpr"
    if named := parameter.annotation_type or SPELLED_OUT.get(parameter.annotation):
        return named
    if parameter.name == WRITTEN.get(variant.kernel):
        return TRITON_NAMES[variant.into or variant.dtype]
    return TRITON_NAMES[variant.dtype] if parameter.name in LOGITS else POINTERS.get(parameter.name, "*fp32")


def limits(variant: Variant, constants: dict[str, object], options: dict[str, int]) -> Limits:
    """No spill anywhere; on rows, every block of the text moves in 16-byte vectors."""
    amd = variant.target.startswith("gfx")
    registers = 512 if amd else options.get("maxnreg", 255)
    threads = options["num_warps"] * (64 if amd else 32)
    loads, stores = (
        max(1, constants["BLOCK"] * constants.get("ROWS", 1) * DTYPES[dtype].itemsize // 16 // threads)
        for dtype in (variant.dtype, variant.into or variant.dtype)
    )
    stored = BLOCKS_STORED.get(variant.kernel, 0)
    if variant.into:  # a tail ends behind a vector of logits: the half of one that its gradient is goes out as such
        stored //= 2
    return Limits(registers, BLOCKS_LOADED[variant.kernel] * loads, stored * stores)
