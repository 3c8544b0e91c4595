"""The row benchmark: loss and gradient over logits. Sizes: N rows (tokens), V vocabulary, S responses.

The logits reach each contender the way an output head would hand them over: as a non-leaf tensor whose gradient goes to
the layer below. That is what lets `inplace=True` reuse their storage, and it spares all of them a copy into `.grad`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import CHECK_UPSTREAM, Answer, Deviation, Passes, Step
from benchmarks.kinds import inputs
from benchmarks.kinds.inputs import IGNORE_INDEX, gft_of_log_probs, tempered
from benchmarks.kinds.kind import BACKENDS, DTYPES, ITEM_BYTES, Case, Kind, Peer, Rows, cross_entropy, served, words_of
from benchmarks.kinds.truth import deviation, row_truth

ERROR_LIMIT = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 3e-2}
"""Largest deviation that still counts as an answer: above any rounding of the dtype, far below any wrong formula."""

# Cases. Vocabularies are the `vocab_size` of the published config.json.

VOCABULARIES = {
    32000: "Llama 2, Mistral 7B v0.1",
    50257: "GPT-2: odd, so rows start unaligned",
    65537: "no model: one above 2^16, the worst tail of every block size",
    128256: "Llama 3",
    129280: "DeepSeek-V3",
    151936: "Qwen2.5 up to 3B, Qwen3",
    256000: "Gemma, Gemma 2",
    262144: "Gemma 3",
}
HEADLINE_VOCABULARY = 151936
HEADLINE_ROWS = {"cpu": 128, "cuda": 8192}


@dataclass(frozen=True)
class RowCase(Case):
    """Rows of logits."""

    rows: int
    vocab: int
    dtype: str = "float32"  # of the logits: float32, bfloat16, float16
    logits: str = "peaked"  # peaked: one token of a row takes .5 to .999; random: standard normal
    dead: str = "none"  # none; masked: a part of each response; zero-advantage: a part of the responses
    dead_share: float = 0.5  # how large that part is

    def label(self) -> str:
        return ", ".join([f"{self.rows} × {self.vocab} {self.dtype} {self.logits}", *words_of(self)])


def cases(device: str, *, quick: bool = False, threads: int = 1) -> list[RowCase]:
    """Headline shapes, then V, N, inputs, dead rows and threads one at a time."""
    head = RowCase(HEADLINE_ROWS[device], HEADLINE_VOCABULARY, device=device, threads=threads)
    if quick:
        small = replace(head, rows=32 if device == "cpu" else 1024)
        return [replace(small, dtype=dtype) for dtype in DTYPES] + [replace(small, dead="zero-advantage")]
    found = [replace(head, dtype=dtype) for dtype in DTYPES]
    for case in list(found):
        found += [replace(case, logits="random")]
        found += [replace(case, dead=dead) for dead in ("masked", "zero-advantage")]
        found += [replace(case, upstream=0.25)]  # gradient accumulation: the gradient is scaled in backward
        found += [replace(case, rows=n) for n in (1, 8, 32)]  # few rows: where launch and set-up costs show
        found += [other for other in _over_vocabularies(case) if other != case]
        if device == "cpu":
            found += [replace(case, threads=2 * threads)]
    return [*found, replace(head, dtype="float16")]


def memory_cases(device: str, threads: int = 1) -> list[RowCase]:
    """Row counts at which peak memory is measured (one step each, in a process of its own on a CPU)."""
    rows = {"cpu": (16, 32, 64, 128), "cuda": (1024, 2048, 4096, 8192)}[device]
    return [RowCase(n, HEADLINE_VOCABULARY, dtype, device=device) for dtype in DTYPES for n in rows]


def vocabulary_sweep(device: str, threads: int = 1) -> list[RowCase]:
    head = RowCase(HEADLINE_ROWS[device], HEADLINE_VOCABULARY, device=device, threads=threads)
    return [case for dtype in DTYPES for case in _over_vocabularies(replace(head, dtype=dtype))]


def gpu_sweep(device: str, threads: int = 1) -> list[RowCase]:
    """What a GPU is asked first: bfloat16, the headline vocabulary, then small to large; float32 after it."""
    head = RowCase(8192, HEADLINE_VOCABULARY, "bfloat16", device=device)
    wide = [replace(head, vocab=vocab) for vocab in (128256, 262144, 50257, 32000)]
    return [head, *wide, replace(head, rows=4096, dtype="float32")]


def small_sweep(device: str, threads: int = 1) -> list[RowCase]:
    """So few rows that launching counts: to be timed as CUDA graphs."""
    return [RowCase(rows, HEADLINE_VOCABULARY, "bfloat16", device=device) for rows in (1, 8, 32)]


def _over_vocabularies(head: RowCase) -> list[RowCase]:
    """As many logits as the headline shape has, in rows of another width."""
    return [replace(head, rows=head.rows * head.vocab // vocab, vocab=vocab) for vocab in VOCABULARIES]


# Inputs and their check.


@dataclass(frozen=True, kw_only=True)
class RowProblem(Rows):
    """Logits a contender may overwrite, and what it needs besides."""

    logits_NV: Tensor  # rewritten before every step
    pristine_NV: Tensor
    limits = ERROR_LIMIT

    def prepare(self, upstream: float) -> None:
        """Put back the logits, for whoever overwrote them and for whoever did not: the same cache for all."""
        self.logits_NV.copy_(self.pristine_NV)
        super().prepare(upstream)

    def deviation(self, answer: Answer, objective: str) -> Deviation:
        """Deviation of loss and gradient from fp64, a few rows at a time."""
        case, (gradient_NV,) = self.case, answer.gradients
        gradient_NV = gradient_NV.reshape(case.rows, case.vocab)
        weight, scale = 1 / max(self.live_rows, 1), CHECK_UPSTREAM / case.temperature
        truth_loss, loss_size, gaps, scales, sizes = 0.0, 0.0, [], [], []
        for start in range(0, case.rows, step := max(1, (1 << 22) // case.vocab)):
            block = slice(start, start + step)
            tempered_nV = self.pristine_NV[block].double() / case.temperature
            credit_n = self.targets_N[block], self.advantages_N[block]
            losses_n, scale_n, truth_nV = row_truth(tempered_nV, *credit_n, weight, objective, case.tau, scale)
            truth_loss += losses_n.sum().item()
            loss_size += losses_n.abs().sum().item()
            scales.append(scale_n)
            sizes.append(truth_nV.norm(dim=1))
            gaps.append((gradient_NV[block].double() - truth_nV).norm(dim=1))
        loss_gap = abs(answer.loss.item() - truth_loss)
        return deviation(loss_gap, loss_size, torch.cat(gaps), torch.cat(scales), torch.cat(sizes))


def build(case: RowCase) -> RowProblem:
    """The inputs of a case, made on its device: the same for the same seed, whatever the dtype (up to its rounding)."""
    generator = torch.Generator(case.device).manual_seed(case.seed)
    logits_NV = torch.randn(case.rows, case.vocab, generator=generator, device=case.device)
    targets_N = torch.randint(case.vocab, (case.rows,), generator=generator, device=case.device)
    if case.logits == "peaked":
        _raise_peaks(logits_NV, targets_N, generator)
    advantages_N, targets_N = inputs.credit(case, targets_N, generator)
    pristine_NV = logits_NV.to(getattr(torch, case.dtype))
    return RowProblem(
        case=case,
        logits_NV=pristine_NV.clone(),
        pristine_NV=pristine_NV,
        targets_N=targets_N,
        advantages_N=advantages_N,
    )


def _raise_peaks(logits_NV: Tensor, targets_N: Tensor, generator: torch.Generator) -> None:
    """Set the likely token's logit so that it has its share of the row."""
    rows, vocab = logits_NV.shape
    peak_N1 = inputs.peak_tokens(targets_N, vocab, generator)[:, None]
    logits_NV.scatter_(1, peak_N1, -math.inf)
    share_N1 = inputs.peak_shares(rows, logits_NV.device)[:, None]
    logits_NV.scatter_(1, peak_N1, logits_NV.logsumexp(1, keepdim=True) + torch.logit(share_N1))


# One step of a loss(logits_NV, problem) -> scalar, token mean over the live rows.


class _Head(torch.autograd.Function):
    """Stands for the layer below the loss: hands out logits that are no leaf and keeps the gradient that comes back."""

    @staticmethod
    def forward(ctx, anchor: Tensor, logits_NV: Tensor, kept: list[Tensor]) -> Tensor:
        ctx.kept = kept
        # a tensor of its own on the same storage: autograd refuses in-place work on a view made in a custom function
        return torch.empty(0, dtype=logits_NV.dtype, device=logits_NV.device).set_(logits_NV)

    @staticmethod
    def backward(ctx, gradient_NV: Tensor):
        ctx.kept.append(gradient_NV)
        return None, None, None


def step_of(
    loss: Callable[[Tensor, RowProblem], Tensor],
    problem: RowProblem,
    around: Callable[[], AbstractContextManager] = nullcontext,
) -> Step:
    """Forward and backward of one loss under the problem's upstream gradient, both inside `around`."""
    anchor = torch.zeros((), device=problem.logits_NV.device, requires_grad=True)

    def step() -> Answer:
        kept: list[Tensor] = []
        with around():
            value = loss(_Head.apply(anchor, problem.logits_NV, kept), problem)
            value.backward(problem.upstream.to(value.dtype))
        return Answer(value.detach(), tuple(kept))

    return step


# Contenders.

READ_WRITE = Passes(1, 1)  # the gradient is written where the logits were, and a row stays on chip in between
TWO_PASS = Passes(2, 1)  # statistics first, gradient from a second read
FLOOR = "floor: bytes read and written"


def floor(problem: RowProblem) -> Step:
    """Every byte of the logits read and written once, in place: what no loss with a gradient can beat.

    As integers, whatever the logits are: in bfloat16 a multiplication would convert and round, and be a floor of
    arithmetic on machines without such instructions.
    """
    bytes_B = problem.logits_NV.view(-1).view(torch.uint8)
    words = bytes_B[: bytes_B.numel() // 8 * 8].view(torch.int64)
    return partial(words.bitwise_xor_, 1)


def ours(backend: str, inplace: bool, logits_NV: Tensor, problem, **options) -> Tensor:
    from gft_kernels import gft_loss

    options |= {"tau": problem.case.tau, "temperature": problem.case.temperature, "inplace": inplace}
    return served(gft_loss, logits_NV, problem.targets_N, advantages=problem.advantages_N, backend=backend, **options)


def ours_by_name(*backends: str, loss: Callable = ours) -> dict[str, Peer]:
    """In place and not. The reference is plain torch: its traffic is torch's, and in place only adds a copy."""
    passes = {"reference": None}
    return {
        f"gft_loss {b}{', in place' * inplace}": Peer(partial(loss, b, inplace), passes=passes.get(b, READ_WRITE))
        for b in backends for inplace in (True, False) if not (b == "reference" and inplace)
    }  # fmt: skip


def paper_loss(logits_NV: Tensor, problem: RowProblem) -> Tensor:
    """The paper's own formulation, in the logits' dtype: a tempered clone, cross-entropy, a full softmax, a gather."""
    case, targets_N = problem.case, problem.targets_N
    live_N = targets_N != IGNORE_INDEX
    tempered_NV = logits_NV.clone() / case.temperature
    nll_N = F.cross_entropy(tempered_NV, targets_N, reduction="none", ignore_index=IGNORE_INDEX)
    pi_N = torch.softmax(tempered_NV, dim=-1).gather(1, targets_N.clamp(min=0)[:, None])[:, 0].detach()
    coefficient_N = torch.where(pi_N < case.tau, pi_N, torch.ones_like(pi_N))
    return (problem.advantages_N * coefficient_N * nll_N * live_N).sum() / live_N.sum()


def lean_loss(logits_NV: Tensor, problem: RowProblem) -> Tensor:
    """What a careful user writes: one fp32 log-softmax, one gather, the coefficient from its exponential."""
    log_pi_NV = torch.log_softmax(tempered(logits_NV, problem), dim=-1, dtype=torch.float32)
    return gft_of_log_probs(log_pi_NV.gather(1, problem.targets_N.clamp(min=0)[:, None])[:, 0], problem)


def _cross_entropy(logits_NV: Tensor, problem: RowProblem) -> Tensor:
    return F.cross_entropy(tempered(logits_NV, problem), problem.targets_N, ignore_index=IGNORE_INDEX)


def _quack_cross_entropy(logits_NV: Tensor, problem: RowProblem) -> Tensor:
    from quack.cross_entropy import cross_entropy

    options = {"ignore_index": IGNORE_INDEX, "reduction": "sum", "inplace_backward": True}
    return cross_entropy(tempered(logits_NV, problem), problem.targets_N, **options) / problem.live_rows


def _trl_loss(logits_NV: Tensor, problem: RowProblem) -> Tensor:
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    targets_1N, temperature = problem.targets_N.clamp(min=0)[None], problem.case.temperature
    log_pi_1N, _entropy = selective_log_softmax_and_entropy(logits_NV[None], targets_1N, temperature)
    return gft_of_log_probs(log_pi_1N[0], problem)


def _liger_grpo(problem: RowProblem) -> Step:
    """Liger reads (S, T + 1, V) logits and skips the last position of each response; the copy is made once, here."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    case, shape_ST = problem.case, inputs.responses_of_one_length(problem.case)
    wide_SUV = F.pad(problem.pristine_NV.view(*shape_ST, case.vocab), (0, 0, 0, 1)).requires_grad_()
    targets_ST = problem.targets_N.view(shape_ST)
    live_ST = targets_ST != IGNORE_INDEX
    options = {
        "completion_ids": targets_ST.clamp(min=0), "completion_mask": live_ST, "old_logp": None, "ref_logp": None,
        "advantages": problem.advantages_N.view(shape_ST)[:, 0].contiguous(),
        "temperature": case.temperature, "beta": 0.0, "inplace": False,
    }  # fmt: skip

    def step() -> Answer:
        losses_ST, _kl, _clipped = triton_grpo_loss(wide_SUV, **options)
        value = (losses_ST * live_ST).sum() / live_ST.sum()
        (gradient_SUV,) = torch.autograd.grad(value, wide_SUV, problem.upstream.to(value.dtype))
        return Answer(value.detach(), (gradient_SUV[:, :-1],))

    return step


PEERS = {
    FLOOR: Peer(step=floor, objective=None, passes=READ_WRITE),
    **ours_by_name(*BACKENDS),
    "eager PyTorch, paper's formulation": Peer(paper_loss, passes=Passes(8, 6)),
    "eager PyTorch, lean": Peer(lean_loss),
    "torch.compile of lean": Peer(lean_loss, compiled=True),
    "F.cross_entropy": Peer(_cross_entropy, "cross-entropy"),
    "Liger cross-entropy": cross_entropy("liger_kernel.transformers.functional", "liger_cross_entropy", TWO_PASS),
    "quack cross-entropy": Peer(_quack_cross_entropy, "cross-entropy", "quack.cross_entropy", on_cpu=False,
                                passes=TWO_PASS),
    "TRL log-probabilities + 3 lines": Peer(_trl_loss, needs="trl.kernels.logprob_entropy", on_cpu=False,
                                            passes=TWO_PASS),
    "Liger GRPO": Peer(step=_liger_grpo, objective="grpo", needs="liger_kernel.transformers.grpo_loss", on_cpu=False,
                       passes=TWO_PASS),
}  # fmt: skip


def logits_bytes(case) -> int:
    return case.rows * case.vocab * ITEM_BYTES[case.dtype]


KIND = Kind("loss and gradient over logits", RowCase, cases, build, PEERS, step_of, logits_bytes,
            weighed=lambda timed, quick: timed[:1] if quick else memory_cases(timed[0].device))  # fmt: skip
