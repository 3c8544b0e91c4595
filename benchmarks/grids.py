"""Which cases each benchmark runs: its grid, and the sweeps that the plots are drawn from."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.shapes import (
    HEADLINE_VOCABULARY,
    VOCABULARIES,
    AdvantageCase,
    LinearCase,
    LogProbCase,
    RowCase,
    ShardCase,
    StepCase,
)

DTYPES = ("float32", "bfloat16")
HEADLINE_ROWS = {"cpu": 128, "cuda": 8192}


def row_cases(device: str, *, quick: bool = False, threads: int = 1) -> list[RowCase]:
    """Headline shapes, then V, N, inputs, dead rows and threads one at a time."""
    rows = HEADLINE_ROWS[device]
    head = RowCase(rows, HEADLINE_VOCABULARY, device=device, threads=threads)
    if quick:
        small = replace(head, rows=32 if device == "cpu" else 1024)
        return [replace(small, dtype=dtype) for dtype in DTYPES] + [replace(small, dead="zero-advantage")]
    cases = [replace(head, dtype=dtype) for dtype in DTYPES]
    for case in list(cases):
        cases += [replace(case, logits="random")]
        cases += [replace(case, dead=dead) for dead in ("masked", "zero-advantage")]
        cases += [replace(case, upstream=0.25)]  # gradient accumulation: the gradient is scaled in backward
        cases += [replace(case, rows=n) for n in (1, 8, 32)]  # few rows: where launch and set-up costs show
        cases += [other for other in _over_vocabularies(case) if other != case]
        if device == "cpu":
            cases += [replace(case, threads=2 * threads)]
    return [*cases, replace(head, dtype="float16")]


def linear_cases(device: str, *, quick: bool = False, threads: int = 1) -> list[LinearCase]:
    """Heads of known models, half-dead rows, chunk sizes."""
    if quick:
        small = LinearCase(64, 128, 32000, device=device, threads=threads)
        return [small, replace(small, dead="zero-advantage")]
    if device == "cpu":
        qwen = LinearCase(512, 896, 151936, threads=threads)  # Qwen2.5-0.5B
        cases = [qwen, replace(qwen, dtype="bfloat16"), replace(qwen, dead="zero-advantage"), replace(qwen, rows=1024)]
        return cases + [replace(qwen, chunk_rows=rows) for rows in (32, 64, 128, 256)]
    heads = ((4096, 128256), (4096, 151936), (896, 151936), (2304, 256000), (1152, 262144))
    #        Llama 3.1 8B    Qwen3 8B        Qwen2.5 0.5B   Gemma 2 2B      Gemma 3 1B
    cases = [LinearCase(8192, d, v, "bfloat16", device=device) for d, v in heads]
    llama = cases[0]
    cases += [replace(llama, dead=dead) for dead in ("zero-advantage", "masked")]
    cases += [replace(llama, rows=rows) for rows in (512, 2048, 32768)]
    return cases + [replace(llama, chunk_rows=rows) for rows in (512, 1024, 2048, 4096, 8192)]


def log_prob_cases(device: str, *, quick: bool = False, threads: int = 1) -> list[LogProbCase]:
    """The heads of Qwen2.5-0.5B and Llama 3.1 8B; quick: a small one."""
    if quick:
        return [LogProbCase(64, 128, 32000, device=device, threads=threads)]
    if device == "cpu":
        return [LogProbCase(512, 896, 151936, dtype, threads=threads) for dtype in DTYPES]
    return [LogProbCase(8192, d, v, "bfloat16", device=device) for d, v in ((4096, 128256), (896, 151936))]


def advantage_cases(device: str, *, quick: bool = False, threads: int = 1) -> list[AdvantageCase]:
    """A micro-batch, a batch, and far more than anyone has; groups together and by id."""
    sizes = (64,) if quick else (64, 4096, 65536)
    cases = [AdvantageCase(n, 8, device=device, threads=threads) for n in sizes]
    return [replace(case, grouped_by=how) for case in cases for how in ("size", "ids")]


def shard_cases(device: str, *, quick: bool = False, threads: int = 1) -> list[ShardCase]:
    """The headline vocabulary over two ranks, each with `threads` threads."""
    head = ShardCase(32 if quick else HEADLINE_ROWS[device], HEADLINE_VOCABULARY, device=device, threads=threads)
    return [head] if quick else [replace(head, dtype=dtype) for dtype in DTYPES]


def step_cases(device: str, *, quick: bool = False, threads: int = 1) -> list[StepCase]:
    """A model small enough for a CPU under the headline vocabulary."""
    if device == "cpu":
        return [StepCase(32 if quick else 64, hidden=64 if quick else 256, threads=threads)]
    return [StepCase(128 if quick else 2048, hidden=896, layers=4, heads=14, dtype="bfloat16", device=device)]


def row_memory_cases(device: str, *, quick: bool = False, threads: int = 1) -> list[RowCase]:
    """Row counts at which peak memory is measured (one step each, in a process of its own on a CPU)."""
    if quick:
        return row_cases(device, quick=True, threads=threads)[:1]
    rows = {"cpu": (16, 32, 64, 128), "cuda": (1024, 2048, 4096, 8192)}[device]
    return [RowCase(n, HEADLINE_VOCABULARY, dtype, device=device) for dtype in DTYPES for n in rows]


def linear_memory_cases(device: str, *, quick: bool = False, threads: int = 1) -> list[LinearCase]:
    cases = linear_cases(device, quick=quick, threads=threads)
    return cases[:1] if quick else cases


def log_prob_memory_cases(device: str, *, quick: bool = False, threads: int = 1) -> list[LogProbCase]:
    return log_prob_cases(device, threads=threads)[:1] if not quick else []


def step_memory_cases(device: str, *, quick: bool = False, threads: int = 1) -> list[StepCase]:
    return [] if quick else step_cases(device, threads=threads)


def no_case(device: str, *, quick: bool = False, threads: int = 1) -> list:
    """Where peak memory says nothing new."""
    return []


def _over_vocabularies(head: RowCase) -> list[RowCase]:
    """As many logits as the headline shape has, in rows of another width."""
    return [replace(head, rows=head.rows * head.vocab // v.size, vocab=v.size) for v in VOCABULARIES]


def vocabulary_sweep(device: str, threads: int = 1) -> list[RowCase]:
    return [
        case
        for dtype in DTYPES
        for case in _over_vocabularies(RowCase(HEADLINE_ROWS[device], HEADLINE_VOCABULARY, dtype, device=device,
                                               threads=threads))
    ]  # fmt: skip


def live_sweep(device: str, threads: int = 1) -> list[LinearCase]:
    """One to all of eight responses with an advantage."""
    head = LinearCase(256, 896, 151936, threads=threads)
    if device == "cuda":
        head = LinearCase(8192, 4096, 151936, "bfloat16", device=device)
    dead = (0.875, 0.75, 0.5, 0.25)
    return [*(replace(head, dead="zero-advantage", dead_share=share) for share in dead), head]


SWEEPS = {
    "vocabulary": ("row", vocabulary_sweep),
    "live": ("linear", live_sweep),
    "memory": ("row", row_memory_cases),
}
"""By name: the benchmark and its cases, in the order of what is swept."""
