"""The shapes that are measured, each with the models it comes from.

N rows (tokens), V vocabulary, D hidden size, S responses.
Sizes are those of the published model configurations (`vocab_size`, `hidden_size` in each config.json).
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Vocabulary:
    size: int
    models: str


VOCABULARIES = (
    Vocabulary(32000, "Llama 2, Mistral 7B v0.1"),
    Vocabulary(50257, "GPT-2: odd, so rows start unaligned"),
    Vocabulary(65537, "no model: one above 2^16, the worst tail of every block size"),
    Vocabulary(128256, "Llama 3"),
    Vocabulary(129280, "DeepSeek-V3"),
    Vocabulary(151936, "Qwen2.5 up to 3B, Qwen3"),
    Vocabulary(256000, "Gemma, Gemma 2"),
    Vocabulary(262144, "Gemma 3"),
)
HEADLINE_VOCABULARY = 151936


@dataclass(frozen=True)
class RowCase:
    """One measurement of the loss over logits. Everything that decides the inputs, so that it can be repeated."""

    rows: int
    vocab: int
    dtype: str = "float32"  # of the logits: float32, bfloat16, float16
    logits: str = "peaked"  # peaked: one token of a row takes .5 to .999; random: standard normal
    dead: str = "none"  # none; masked: half of each response; zero-advantage: half of the responses
    responses: int = 8
    tau: float = 0.7
    temperature: float = 1.0
    upstream: float = 1.0  # of the timed steps: 1 is a plain loss.backward(). Answers are checked under another one
    seed: int = 20
    device: str = "cpu"
    threads: int = 1  # CPU only

    def label(self) -> str:
        words = [f"{self.rows} × {self.vocab} {self.dtype} {self.logits}"]
        if self.dead != "none":
            words.append(f"half {self.dead}")
        if self.upstream != 1.0:
            words.append(f"upstream {self.upstream:g}")
        if self.device == "cpu":
            words.append(f"{self.threads} thread{'s' if self.threads > 1 else ''}")
        return ", ".join(words)


@dataclass(frozen=True)
class LinearCase:
    """One measurement of the loss over hidden states and the output head."""

    rows: int
    hidden: int
    vocab: int
    dtype: str = "float32"
    dead: str = "none"
    responses: int = 8
    tau: float = 0.7
    temperature: float = 1.0
    upstream: float = 1.0
    seed: int = 20
    device: str = "cpu"
    threads: int = 1
    chunk_rows: int | None = None  # of gft_linear_loss; None: its own choice

    def label(self) -> str:
        words = [f"{self.rows} × {self.hidden} × {self.vocab} {self.dtype}"]
        if self.dead != "none":
            words.append(f"half {self.dead}")
        if self.chunk_rows:
            words.append(f"chunks of {self.chunk_rows}")
        if self.upstream != 1.0:
            words.append(f"upstream {self.upstream:g}")
        if self.device == "cpu":
            words.append(f"{self.threads} thread{'s' if self.threads > 1 else ''}")
        return ", ".join(words)


def row_cases(device: str, *, quick: bool = False, threads: int = 1) -> list[RowCase]:
    """The grid of the row benchmark: headline shapes, then V, N, inputs, dead rows and threads one at a time."""
    dtypes = ("float32", "bfloat16")
    rows = {"cpu": 128, "cuda": 8192}[device]
    head = RowCase(rows, HEADLINE_VOCABULARY, device=device, threads=threads)
    if quick:
        small = replace(head, rows=32 if device == "cpu" else 1024)
        return [replace(small, dtype=dtype) for dtype in dtypes] + [replace(small, dead="zero-advantage")]
    cases = [replace(head, dtype=dtype) for dtype in dtypes]
    for dtype in dtypes:
        case = replace(head, dtype=dtype)
        cases += [replace(case, logits="random")]
        cases += [replace(case, dead=dead) for dead in ("masked", "zero-advantage")]
        cases += [replace(case, upstream=0.25)]  # gradient accumulation: the gradient is scaled in backward
        cases += [replace(case, rows=n) for n in (1, 8, 32)]  # few rows: where launch and set-up costs show
        # as many logits as the headline shape has, in rows of another width
        others = [v.size for v in VOCABULARIES if v.size != head.vocab]
        cases += [replace(case, rows=rows * head.vocab // vocab, vocab=vocab) for vocab in others]
        if device == "cpu":
            cases += [replace(case, threads=2 * threads)]
    cases += [replace(head, dtype="float16")]
    return cases


def linear_cases(device: str, *, quick: bool = False, threads: int = 1) -> list[LinearCase]:
    """The grid of the linear benchmark: heads of known models, half-dead rows, chunk sizes."""
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


def memory_cases(device: str, *, quick: bool = False) -> list[RowCase]:
    """Row counts at which peak memory is measured (one step each, in a process of its own on a CPU)."""
    rows = (16,) if quick else {"cpu": (16, 32, 64, 128), "cuda": (1024, 2048, 4096, 8192)}[device]
    return [RowCase(n, HEADLINE_VOCABULARY, dtype, device=device) for dtype in ("float32", "bfloat16") for n in rows]
