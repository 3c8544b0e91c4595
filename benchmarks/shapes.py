"""What a measurement is made of, and the vocabularies that are measured with the models they come from.

N rows (tokens), V vocabulary, D hidden size, S responses. Which cases a benchmark runs is decided in grids.py.
Sizes are those of the published model configurations (`vocab_size`, `hidden_size` in each config.json).
"""

from __future__ import annotations

from dataclasses import dataclass


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
    dead: str = "none"  # none; masked: a part of each response; zero-advantage: a part of the responses
    responses: int = 8
    tau: float = 0.7
    temperature: float = 1.0
    upstream: float = 1.0  # of the timed steps: 1 is a plain loss.backward(). Answers are checked under another one
    seed: int = 20
    device: str = "cpu"
    threads: int = 1  # CPU only
    dead_share: float = 0.5  # how large that part is

    def label(self) -> str:
        return ", ".join([f"{self.rows} × {self.vocab} {self.dtype} {self.logits}", *_differences(self)])


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
    dead_share: float = 0.5

    def label(self) -> str:
        chunks = [f"chunks of {self.chunk_rows}"] if self.chunk_rows else []
        return ", ".join([f"{self.rows} × {self.hidden} × {self.vocab} {self.dtype}", *_differences(self, *chunks)])


@dataclass(frozen=True)
class LogProbCase(LinearCase):
    """One measurement of the targets' log-probabilities, without gradient."""

    def label(self) -> str:
        return f"log-probs {super().label()}"


@dataclass(frozen=True)
class ShardCase(RowCase):
    """One measurement of the loss over logits sharded over the vocabulary; `threads` are each rank's."""

    ranks: int = 2

    def label(self) -> str:
        return f"{super().label()}, {self.ranks} ranks"


@dataclass(frozen=True)
class AdvantageCase:
    """One measurement of rewards becoming advantages."""

    responses: int
    group_size: int
    grouped_by: str = "size"  # size: groups lie together; ids: in any order
    seed: int = 20
    device: str = "cpu"
    threads: int = 1

    def label(self) -> str:
        how = {"size": "together", "ids": "by id"}[self.grouped_by]
        return ", ".join([f"{self.responses} rewards in groups of {self.group_size} {how}", *_threads(self)])


@dataclass(frozen=True)
class StepCase:
    """One measurement of an optimizer step of a Qwen2-shaped model with random weights and tied embeddings."""

    tokens: int  # of each response
    vocab: int = HEADLINE_VOCABULARY
    hidden: int = 256
    layers: int = 2
    heads: int = 4
    dtype: str = "float32"
    responses: int = 4
    tau: float = 0.7
    temperature: float = 1.0
    upstream: float = 1.0
    seed: int = 20
    device: str = "cpu"
    threads: int = 2

    @property
    def rows(self) -> int:
        return self.responses * self.tokens

    def label(self) -> str:
        model = f"{self.layers} layers × {self.hidden} × {self.vocab}"
        return ", ".join([f"step of {self.responses} × {self.tokens} tokens, {model} {self.dtype}", *_threads(self)])


def _differences(case: RowCase | LinearCase, *own: str) -> list[str]:
    """What a label says of a case beyond its shape."""
    words = list(own)
    if case.dead != "none":
        share = "half" if case.dead_share == 0.5 else f"{case.dead_share:.0%}"
        words.insert(0, f"{share} {case.dead}")
    if case.upstream != 1.0:
        words.append(f"upstream {case.upstream:g}")
    return words + _threads(case)


def _threads(case) -> list[str]:
    return [f"{case.threads} thread{'s' if case.threads > 1 else ''}"] if case.device == "cpu" else []
