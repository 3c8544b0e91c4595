"""What Triton's compiler is asked for, without a GPU: few variants, and a gate that can fail."""

from __future__ import annotations

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed (pip install triton)", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from gft_kernels.triton_kernels import launch, row_loss, scale_rows, shard
from gft_kernels.triton_kernels import measures as row_measures
from tests.codegen import measures, triton_gate

KERNELS = {
    name: kernel
    for module in (row_loss, scale_rows, shard, row_measures)
    for name, kernel in vars(module).items()
    if name.endswith("_kernel")
}
LENGTHS = [1, 2, 15, 16, 17, 50257, 2**20, 2**31, 2**33 + 5]


def specialisations(kernel, numbers):
    """The cache keys Triton would make for a kernel's launches whose integers all take each of these values."""
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    keys = set()
    for number in numbers:
        for storage_offset in (0, 1):  # a pointer on, and off, a 16-byte boundary
            arguments = {}
            for p in kernel.params:
                pointer = torch.empty(8)[storage_offset:]
                arguments[p.name] = 64 if p.is_constexpr else number if p.annotation_type else pointer
                if p.annotation_type == "fp32":
                    arguments[p.name] = float(number)
            keys.add(str(bind(**arguments)[1]))
    return keys


@pytest.mark.parametrize("name", KERNELS)
def test_no_length_stride_or_address_compiles_anew(name):
    assert len(specialisations(KERNELS[name], LENGTHS)) == 1


def test_a_plain_kernel_would_compile_anew():
    """The measure itself: without `compiled_once` the same launches are several variants."""
    import triton

    assert len(specialisations(triton.jit(row_loss.row_loss_kernel.fn), LENGTHS)) > 1


def test_every_kernel_is_behind_the_gate():
    behind = {f"{variant.kernel}_kernel" for variant in triton_gate.variants()}
    assert behind == set(KERNELS)


def test_at_most_two_constants_besides_the_block():
    for kernel in KERNELS.values():
        constants = {p.name for p in kernel.params if p.is_constexpr}
        assert len(constants - {"BLOCK"}) <= 2, kernel


@pytest.mark.slow
def test_the_gate_passes_for_one_kernel_on_every_target():
    constants = (("SOFTCAP", 30.0), ("ENTROPY", True))
    chosen = [triton_gate.Variant("row_loss", target, "bfloat16", 151936, constants) for target in triton_gate.TARGETS]
    assert set(chosen) <= set(triton_gate.variants())
    verdicts = [triton_gate.judge(variant) for variant in chosen]
    assert measures.print_table(verdicts)


@pytest.mark.slow
def test_the_gate_fails_a_launch_that_spills():
    """16 bytes a load and 64 registers cannot hold 64 elements a thread."""
    variant = triton_gate.Variant("row_loss", "sm_90", "bfloat16", 151936, (("SOFTCAP", 30.0), ("ENTROPY", True)))
    kernel, constants, _ = triton_gate.recipe(variant)
    constants["BLOCK"], options = 32768, launch.RowLaunch(32768, 16, 64).options()
    measured, _ = triton_gate.compile_and_measure(kernel, variant, constants, options)
    assert any("stack" in sentence for sentence in triton_gate.limits(variant, constants, options).broken_by(measured))


def test_a_broken_limit_is_a_sentence():
    limits = measures.Limits(registers=64, wide_loads=12, wide_stores=4)
    good = measures.Measures(64, 0, 0, 12, 22, 8, 40, 0)
    assert limits.broken_by(good) == []
    bad = measures.Measures(65, 8, 1, 11, 3, 8, 40, 2)
    assert [s.split(" must")[0] for s in limits.broken_by(bad)] == [
        "registers", "the stack", "registers", "local memory", "16-byte loads", "16-byte stores",
    ]  # fmt: skip
