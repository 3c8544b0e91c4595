"""What the fused losses save at a model's size. Arithmetic, not a measurement; docs/calculator.html computes the same.

Sizes: N rows (response tokens of a micro-batch), D hidden size, V vocabulary; b bytes of a number of the model.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.kinds.row import PEERS, READ_WRITE, TWO_PASS, Passes
from benchmarks.tables import markdown
from gft_kernels.linear.chunks import chunk_rows

MODELS = {  # hidden size, vocabulary: of their config.json
    "Qwen2.5-1.5B": (1536, 151936),
    "Qwen3-8B": (4096, 151936),
    "Llama-3.2-1B": (2048, 128256),
    "Llama-3.1-8B": (4096, 128256),
    "Gemma-3-1B": (1152, 262144),
    "Gemma-3-12B": (3840, 262208),
}
PASSES: Passes = PEERS["eager PyTorch, paper's formulation"].passes


class GPU(NamedTuple):
    """Bytes a second to memory, as its maker states them, and the passes of our fastest kernel there."""

    bandwidth: float
    passes: Passes


GPUS = {
    "A100 80GB": GPU(2.04e12, TWO_PASS),
    "H100 SXM": GPU(3.35e12, READ_WRITE),
    "H200": GPU(4.8e12, READ_WRITE),
    "B200": GPU(8.0e12, READ_WRITE),
    "MI300X": GPU(5.3e12, TWO_PASS),
}


def whole_logits(rows: int, vocabulary: int, bytes_each: int) -> int:
    """Bytes of the logits and their gradient: the least that a loss over whole logits has at once."""
    return 2 * bytes_each * rows * vocabulary


def chunked_head(rows: int, hidden: int, vocabulary: int) -> int:
    """Bytes beside inputs and gradients in the model's type: a chunk of logits, dW and dX in float32."""
    chunk = min(chunk_rows(rows, vocabulary, 4, "cuda"), rows)
    return 4 * chunk * vocabulary + 4 * vocabulary * hidden + 4 * rows * hidden


def seconds(rows: int, vocabulary: int, bytes_each: int, bandwidth: float, passes: Passes) -> float:
    """The least time for so many passes over the logits at a bandwidth."""
    return (passes.reads + passes.writes) * rows * vocabulary * bytes_each / bandwidth


def table(rows: int = 16384, bytes_each: int = 2, gpu: str = "H100 SXM") -> str:
    """Markdown: memory and predicted time of every model."""
    head = [f"{rows:,} response tokens, bfloat16", "whole, loss in float32", "whole, in bfloat16", "`gft_linear_loss`",
            f"eager loss, {gpu}", "`gft_loss`"]  # fmt: skip
    lines = []
    for name, (hidden, vocabulary) in MODELS.items():
        memory = [whole_logits(rows, vocabulary, 4), whole_logits(rows, vocabulary, bytes_each)]
        memory.append(chunked_head(rows, hidden, vocabulary))
        times = [seconds(rows, vocabulary, bytes_each, GPUS[gpu].bandwidth, p) for p in (PASSES, GPUS[gpu].passes)]
        cells = [*(f"{size / 1e9:.2f} GB" for size in memory), *(f"{1e3 * time:.1f} ms" for time in times)]
        lines.append([f"{name}: D {hidden:,}, V {vocabulary:,}", *cells])
    return markdown(head, lines)


def chunk_table() -> str:
    """Markdown: what the linear loss has beside its inputs, part by part, for 8192 × 2048 × 151936."""
    rows, hidden, vocab = 8192, 2048, 151936
    chunk = chunk_rows(rows, vocab, 4, "cuda")
    parts = (
        ("one chunk of logits, float32; their gradient lies over them", "4·C·V", chunk * vocab, f" at C = {chunk}"),
        ("dW, float32, until backward rounds it", "4·V·D", vocab * hidden, ""),
        ("dX, float32, and a few numbers per row", "4·R·D", rows * hidden, ""),
        ("for comparison: bfloat16 logits and their gradient", "4·R·V", rows * vocab, ""),
    )
    lines = [(part, of, f"{4 * numbers / 1e9:.2f} GB{at}") for part, of, numbers, at in parts]
    return markdown(["", "bytes", f"{rows} × {hidden} × {vocab} bfloat16 on a GPU"], lines)
