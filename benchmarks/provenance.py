"""Where a figure comes from: machine, commit, versions, allocator. Also the re-start under another allocator."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

# By default glibc maps every large block afresh and unmaps it on free, so that each logits-sized temporary pays a page
# fault per 4 KiB: eager PyTorch then measures the kernel's memory manager (764 ms where 69 ms are its own).
# These settings keep freed blocks; every contender gains, eager code the most.
KEEP_FREED_BLOCKS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1000000000000"}
ALLOCATORS = ("keep", "default")  # "keep": by those settings

PACKAGES = ("torch", "triton", "numpy", "gft-kernels", "liger-kernel", "quack-kernels", "cut-cross-entropy", "trl")
INSTRUCTION_SETS = ("avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")


def restart_under(allocator: str, module: str) -> None:
    """Start `python -m module` again under one of ALLOCATORS; does nothing without glibc, or where that is the one."""
    environment = default_allocator_environment() | (KEEP_FREED_BLOCKS if allocator == "keep" else {})
    if platform.libc_ver()[0] == "glibc" and environment != dict(os.environ):
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], environment)


def default_allocator_environment() -> dict[str, str]:
    """The environment without those settings: memory is measured with freed blocks given back."""
    return {name: value for name, value in os.environ.items() if name not in KEEP_FREED_BLOCKS}


def allocator(device: str = "cpu") -> str:
    if device == "cuda":
        return f"torch CUDA caching allocator, settings {os.environ.get('PYTORCH_CUDA_ALLOC_CONF', '') or 'default'}"
    libc = " ".join(platform.libc_ver()).strip() or platform.system()
    settings = " ".join(f"{name}={os.environ[name]}" for name in KEEP_FREED_BLOCKS if name in os.environ)
    preload = os.environ.get("LD_PRELOAD", "")
    return ", ".join(word for word in (libc, settings or "default settings", preload) if word)


def machine(device: str = "cpu") -> dict:
    cpu = _cpu_fields()
    facts = {
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in (cpu.get("flags") or "").split()],
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return facts


def load_average() -> float | None:
    """Processes that wanted a core in the last minute; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def commit() -> dict:
    """Commit of the measured tree; dirty where a tracked file differs from it that is not itself a measurement.

    `GFT_COMMIT` in the environment names it where the tree is a copy that git cannot speak for.
    """
    if given := os.environ.get("GFT_COMMIT"):
        return {"revision": given, "dirty": False}
    revision = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "-uno", "--", ":/", ":(exclude,top)benchmarks/results")
    return {"revision": revision or "not a git checkout", "dirty": bool(changed)}


def last_change(path: Path) -> dict:
    """The commit that changed a file last, and when."""
    revision, _, date = _git("log", "-1", "--format=%H %cI", "--", str(path)).partition(" ")
    return {"revision": revision or "not committed", "date": date}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return {**found, "torch": torch.__version__}  # which names the build, as its metadata may not


def last_level_cache_bytes() -> int:
    """Size of CPU 0's largest cache, or 64 MiB where the system does not say."""
    found = [entry.read_text().strip() for entry in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    sizes = [int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1], 0) for text in found]
    return max(sizes, default=64 << 20)


def _cpu_fields() -> dict[str, str]:
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def _git(*arguments: str) -> str:
    try:
        here = Path(__file__).parent
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
