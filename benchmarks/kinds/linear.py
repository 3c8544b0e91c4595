"""The linear benchmark: loss and gradients over hidden states and output head.

The gradients asked for are those of the hidden states and of the head, so three products are the least.
Sizes: N rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import recorded
from benchmarks.harness import CHECK_UPSTREAM, AbsentError, Answer, Deviation, Step
from benchmarks.kinds import inputs
from benchmarks.kinds.inputs import IGNORE_INDEX, gft_of_log_probs, tempered
from benchmarks.kinds.kind import BACKENDS, ITEM_BYTES, Case, Kind, Peer, Rows, cross_entropy, served, words_of
from benchmarks.kinds.truth import coefficients, deviation, relative_error

ERROR_LIMIT = {"float32": 2e-3, "bfloat16": 1e-1, "float16": 5e-2}
"""As for rows; wider in bf16, where the product rounds a logit of 15 to 0.06, so π by 6 %, before any loss sees it."""

FILTERED_LIMIT = 2e-2
"""Under `filter_eps`; rounding the logits' gradient to bfloat16 puts the worst row off by about 1e-2."""

SAMPLED_ROWS, SAMPLED_TOKENS = 64, 256

# Cases. Heads are the `hidden_size` and `vocab_size` of the published config.json.


@dataclass(frozen=True)
class LinearCase(Case):
    """A head and its rows."""

    rows: int
    hidden: int
    vocab: int
    dtype: str = "float32"
    dead: str = "none"
    chunk_rows: int | None = None  # of gft_linear_loss; None: its own choice
    dead_share: float = 0.5
    states: str = "leaning"
    """Where the rows come from: `leaning`, normal numbers that lean towards one token, which leaves a flat tail;
    `trained`, over a random head as sure as a trained model is; `smollm2`, recorded."""

    @property
    def of_one_length(self) -> bool:
        return self.states != "smollm2"

    def label(self) -> str:
        words = [self.states] if self.states != "leaning" else []
        words += [f"chunks of {self.chunk_rows}"] if self.chunk_rows else []
        return ", ".join([f"{self.rows} × {self.hidden} × {self.vocab} {self.dtype}", *words_of(self, *words)])


def cases(device: str, *, quick: bool = False, threads: int = 1) -> list[LinearCase]:
    """Heads of known models, half-dead rows, chunk sizes."""
    if quick:
        small = LinearCase(64, 128, 32000, device=device, threads=threads)
        return [small, replace(small, dead="zero-advantage")]
    if device == "cpu":
        qwen = LinearCase(512, 896, 151936, threads=threads)  # Qwen2.5-0.5B
        found = [qwen, replace(qwen, dtype="bfloat16"), replace(qwen, dead="zero-advantage"), replace(qwen, rows=1024)]
        return found + [replace(qwen, chunk_rows=rows) for rows in (32, 64, 128, 256)]
    heads = ((4096, 128256), (4096, 151936), (896, 151936), (2304, 256000), (1152, 262144))
    #        Llama 3.1 8B    Qwen3 8B        Qwen2.5 0.5B   Gemma 2 2B      Gemma 3 1B
    found = [LinearCase(8192, d, v, "bfloat16", device=device) for d, v in heads]
    llama = found[0]
    found += [replace(llama, dead=dead) for dead in ("zero-advantage", "masked")]
    found += [replace(llama, rows=rows) for rows in (512, 2048, 32768)]
    return found + [replace(llama, chunk_rows=rows) for rows in (512, 1024, 2048, 4096, 8192)]


def live_sweep(device: str, threads: int = 1) -> list[LinearCase]:
    """One to all of eight responses with an advantage."""
    head = LinearCase(256, 896, 151936, threads=threads)
    if device == "cuda":
        head = LinearCase(8192, 4096, 151936, "bfloat16", device=device)
    dead = (0.875, 0.75, 0.5, 0.25)
    return [*(replace(head, dead="zero-advantage", dead_share=share) for share in dead), head]


def sparse_sweep(device: str, threads: int = 1) -> list[LinearCase]:
    """A real head, a larger one, and one whose tail is flat."""
    large = LinearCase(512, 896, 151936, device=device, threads=threads)
    if device == "cuda":
        large = LinearCase(8192, 4096, 128256, "bfloat16", device=device)
    real = replace(large, rows=len(recorded.answers().targets_N), hidden=576, vocab=49152, states="smollm2")
    return [real, replace(real, rows=2048), replace(large, states="trained"), large]


def gpu_sweep(device: str, threads: int = 1) -> list[LinearCase]:
    """Llama 3.1 8B, Qwen2.5 1.5B."""
    return [LinearCase(8192, d, v, "bfloat16", device=device) for d, v in ((4096, 128256), (1536, 151936))]


# Inputs and their check.


@dataclass(frozen=True, kw_only=True)
class LinearProblem(Rows):
    """Hidden states and head, which no step overwrites."""

    hidden_ND: Tensor  # leaf that requires grad
    weight_VD: Tensor  # leaf that requires grad
    limits = ERROR_LIMIT

    @cached_property
    def target_logits_N(self) -> Tensor:
        """The logit of every row's target, fp64; of token 0 where there is none."""
        target_weight_ND = self.weight_VD.detach()[self.targets_N.clamp(min=0)]
        return (self.hidden_ND.detach().double() * target_weight_ND.double()).sum(1) / self.case.temperature

    @cached_property
    def log_masses_N(self) -> Tensor:
        """log Σ e^z of every row, fp64, in nats: one product of the full size, so it is kept for all contenders."""
        weight_DV = self.weight_VD.detach().double().t()
        rows = max(1, (1 << 25) // self.case.vocab)
        blocks = self.hidden_ND.detach().double().split(rows)
        return torch.cat([(block @ weight_DV / self.case.temperature).logsumexp(1) for block in blocks])

    def deviation(self, answer: Answer, objective: str) -> Deviation:
        """Deviation of the loss, of dX in sampled rows and of dW in sampled tokens, targets among them."""
        hidden_ND, weight_VD = self.hidden_ND.detach(), self.weight_VD.detach()
        dhidden_ND, dweight_VD = answer.gradients
        live_N, index_N = self.targets_N != IGNORE_INDEX, self.targets_N.clamp(min=0)
        log_pi_N = self.target_logits_N - self.log_masses_N
        kappa_N, loss_N = coefficients(log_pi_N, self.advantages_N.double(), objective, self.case.tau)
        weight_N = live_N / max(self.live_rows, 1)
        scale_N = weight_N * kappa_N * CHECK_UPSTREAM / self.case.temperature
        loss_gap = abs(answer.loss.item() - (weight_N * loss_N).sum().item())
        loss_size = (weight_N * loss_N).abs().sum().item()

        rows_n = torch.linspace(0, self.case.rows - 1, min(SAMPLED_ROWS, self.case.rows)).long().to(index_N.device)
        dlogits_nV = self._dlogits(hidden_ND[rows_n], weight_VD, rows_n, None, scale_N)
        truth_nD = dlogits_nV @ weight_VD.double()
        dx_scales_n = scale_N[rows_n].abs() * weight_VD[index_N[rows_n]].double().norm(dim=1)
        dx_gaps_n = (dhidden_ND[rows_n].double() - truth_nD).norm(dim=1)
        of_dx = deviation(loss_gap, loss_size, dx_gaps_n, dx_scales_n, truth_nD.norm(dim=1))

        spread_v = torch.arange(0, self.case.vocab, max(1, self.case.vocab // SAMPLED_TOKENS), device=index_N.device)
        tokens_v = torch.cat([index_N[rows_n], spread_v]).unique()
        dlogits_Nv = self._dlogits(hidden_ND, weight_VD[tokens_v], None, tokens_v, scale_N)
        truth_vD = dlogits_Nv.t() @ hidden_ND.double()
        pulls_N = scale_N.abs() * hidden_ND.double().norm(dim=1)
        dw_scales_V = torch.zeros(self.case.vocab, dtype=torch.float64, device=index_N.device)
        dw_scales_V.index_add_(0, index_N, pulls_N)
        dw_gaps_v = (dweight_VD[tokens_v].double() - truth_vD).norm(dim=1)
        dw_sizes_v = truth_vD.norm(dim=1)
        # a token that is nobody's target has no scale of its own, only the size that all rows' π give it
        dw_error = relative_error(dw_gaps_v, torch.maximum(dw_scales_V[tokens_v], dw_sizes_v))
        dw_worst = relative_error(dw_gaps_v, dw_sizes_v)
        return Deviation(max(of_dx.scaled, dw_error), max(of_dx.worst_row, dw_worst))

    def _dlogits(self, hidden, weight, rows: Tensor | None, tokens: Tensor | None, scale_N: Tensor) -> Tensor:
        """F7 in fp64 on a block: some rows with all tokens, or all rows with some tokens (None: all)."""
        chosen = slice(None) if rows is None else rows
        columns = torch.arange(self.case.vocab, device=scale_N.device) if tokens is None else tokens
        logits = hidden.double() @ weight.double().t() / self.case.temperature
        probabilities = (logits - self.log_masses_N[chosen][:, None]).exp()
        is_target = columns[None, :] == self.targets_N.clamp(min=0)[chosen][:, None]
        return scale_N[chosen][:, None] * (probabilities - is_target.double())


def build(case: LinearCase) -> LinearProblem:
    """Normal hidden states, each leaning towards one token's row of the head so that π is about .5 to .999 there; or
    as the case says. Every eighth `trained` row has the second of its likely tokens for its target, not the first."""
    generator = torch.Generator(case.device).manual_seed(case.seed)
    if case.states == "smollm2":
        return _problem(case, *_recorded(case.rows))
    weight_VD = torch.randn(case.vocab, case.hidden, generator=generator, device=case.device).div_(case.hidden**0.5)
    if case.states == "trained":
        hidden_ND, likely_NK = trained_states(weight_VD, case.rows, generator)
        targets_N = torch.where(torch.arange(case.rows, device=case.device) % 8 == 7, likely_NK[:, 1], likely_NK[:, 0])
    else:
        hidden_ND = torch.randn(case.rows, case.hidden, generator=generator, device=case.device)
        targets_N = torch.randint(case.vocab, (case.rows,), generator=generator, device=case.device)
        # the other logits are about standard normal: log Σ e^z = log V + 1/2
        height_N = torch.logit(inputs.peak_shares(case.rows, case.device)) + math.log(case.vocab) + 0.5
        peak_ND = weight_VD[inputs.peak_tokens(targets_N, case.vocab, generator)]
        hidden_ND += (height_N / peak_ND.square().sum(1))[:, None] * peak_ND
    advantages_N, targets_N = inputs.credit(case, targets_N, generator)
    return _problem(case, hidden_ND, targets_N, advantages_N, weight_VD)


LIKELY = 32  # tokens that a row of `trained` states leans to
TAIL = 0.05  # what all others have of what the likeliest leaves


def trained_states(weight_VD: Tensor, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Hidden states (N, D) that make a random head, rows N(0, 1/D), as sure as a trained one, and tokens (N, LIKELY).

    All rows share how common a token is: logits of N(0, 1.9²), and of N(0, 2.4²) once each leans to tokens drawn by it:
    the first of log-odds N(3.9, 3²), the k-th after it as k^-1.5 of the rest. Over such a head Σ e^z is V·e^(|x|²/2D);
    below a D of about 900 no row need have that.
    """
    vocab, hidden = weight_VD.shape
    shared_D = torch.zeros(hidden, device=weight_VD.device)
    shared_D[0] = 1.9 * hidden**0.5
    chances_NV = (weight_VD @ shared_D).softmax(0).expand(rows, vocab)
    tokens_NK = torch.multinomial(chances_NV, LIKELY, generator=generator)
    odds_N1 = 3.9 + 3.0 * torch.randn(rows, 1, generator=generator, device=weight_VD.device)
    first_N1 = torch.sigmoid(odds_N1).clamp(0.05, 0.9999)
    fall_K = torch.arange(1, LIKELY, device=weight_VD.device) ** -1.5
    shares_NK = torch.cat([first_N1, (1 - TAIL) * (1 - first_N1) * fall_K / fall_K.sum()], 1)
    likely_NKD = weight_VD[tokens_NK]
    gram_NKK, apart_NK = likely_NKD @ likely_NKD.mT, shares_NK.log() - likely_NKD @ shared_D
    hidden_ND = shared_D.expand(rows, hidden)
    for _ in range(20):  # |x| decides what the others sum to, and that how far the logits of these must stand out
        log_tail_N1 = math.log(vocab) + hidden_ND.square().sum(1, True) / (2 * hidden)
        log_mass_N1 = log_tail_N1 - torch.log(TAIL * (1 - first_N1))
        lean_NK = torch.linalg.solve(gram_NKK, apart_NK + log_mass_N1)
        hidden_ND = shared_D + (lean_NK[:, None] @ likely_NKD)[:, 0]
    return hidden_ND, tokens_NK


def _recorded(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, targets, advantages (1 of an expert's answer, -0.7 of a teacher's) and head of a real model."""
    found, weight_VD = recorded.answers(rows), recorded.head()
    return found.hidden_ND.float(), found.targets_N, torch.where(found.response_N % 2 == 0, 1.0, -0.7), weight_VD


def _problem(case: LinearCase, hidden_ND: Tensor, targets_N: Tensor, advantages_N: Tensor, weight_VD: Tensor):
    dtype = getattr(torch, case.dtype)
    return LinearProblem(
        case=case,
        hidden_ND=hidden_ND.to(case.device, dtype).requires_grad_(),
        weight_VD=weight_VD.to(case.device, dtype).requires_grad_(),
        targets_N=targets_N.to(case.device),
        advantages_N=advantages_N.to(case.device),
    )


# One step of a loss(hidden_ND, weight_VD, problem) -> scalar.


def step_of(loss: Callable[[Tensor, Tensor, Any], Tensor], problem: LinearProblem) -> Step:
    """Loss and gradients under the problem's upstream gradient."""

    def step() -> Answer:
        hidden_ND, weight_VD = problem.hidden_ND, problem.weight_VD
        value = loss(hidden_ND, weight_VD, problem)
        gradients = torch.autograd.grad(value, (hidden_ND, weight_VD), problem.upstream.to(value.dtype))
        return Answer(value.detach(), gradients)

    return step


def bare_products(hidden_ND: Tensor, weight_VD: Tensor, products: int = 3) -> Step:
    """logits = X·Wᵀ, dX = G·W and dW = Gᵀ·X, with the logits themselves standing in for G; nothing is allocated.

    products: 1 leaves it at the logits.

    For each product both orientations are tried once, A·B into a matrix and Bᵀ·Aᵀ into its transpose, and the faster
    is kept: libraries differ in which layout of a skinny product they do well.
    """
    hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
    logits_NV = hidden_ND.new_empty(hidden_ND.shape[0], weight_VD.shape[0])
    dhidden_ND, dweight_VD = torch.empty_like(hidden_ND), torch.empty_like(weight_VD)
    # in this order: the products that read the logits need them filled with numbers of their own size
    wanted = (
        (hidden_ND, weight_VD.t(), logits_NV),
        (logits_NV, weight_VD, dhidden_ND),
        (logits_NV.t(), hidden_ND, dweight_VD),
    )
    chosen: list[Step] = []

    def step() -> None:
        with torch.no_grad():
            if not chosen:
                chosen.extend(_faster(*product) for product in wanted[:products])
            for product in chosen:
                product()

    return step


def _faster(a: Tensor, b: Tensor, out: Tensor) -> Step:
    """The faster of out = a·b and outᵀ = bᵀ·aᵀ, by two tries each."""
    flipped = out.new_empty(out.shape[::-1])
    candidates = (lambda: torch.mm(a, b, out=out), lambda: torch.mm(b.t(), a.t(), out=flipped))
    best = min(range(2), key=lambda i: min(_seconds(candidates[i]) for _ in range(2)))
    if best == 0:
        return candidates[0]
    out.copy_(flipped.t())
    return candidates[1]


def _seconds(product: Step) -> float:
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    product()
    wait()
    return time.perf_counter() - start


# Contenders.


BFLOAT16_AUTO = 2.0**-11
"""What `filter_eps="auto"` is in bfloat16: float32 operands are measured at the same error."""


def ours(backend: str, hidden_ND: Tensor, weight_VD: Tensor, problem, **options) -> Tensor:
    """options: of gft_linear_loss, beside those that the case sets."""
    from gft_kernels import gft_linear_loss

    case, tensors = problem.case, (hidden_ND, weight_VD, problem.targets_N)
    options |= {"tau": case.tau, "temperature": case.temperature, "backend": backend}
    options.setdefault("chunk_rows", getattr(case, "chunk_rows", None))
    return served(gft_linear_loss, *tensors, advantages=problem.advantages_N, **options)


def eager_loss(hidden_ND: Tensor, weight_VD: Tensor, problem) -> Tensor:
    """All logits at once, then the lean row loss: one fp32 log-softmax and one gather."""
    return gft_of_log_probs(log_probs_of_all_logits(hidden_ND, weight_VD, problem), problem)


def log_probs_of_all_logits(hidden_ND: Tensor, weight_VD: Tensor, problem) -> Tensor:
    logits_NV = tempered(F.linear(hidden_ND, weight_VD), problem)
    log_pi_NV = torch.log_softmax(logits_NV, dim=-1, dtype=torch.float32)
    return log_pi_NV.gather(1, problem.targets_N.clamp(min=0)[:, None])[:, 0]


def _torch_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, problem, chunked: bool = False) -> Tensor:
    if not hasattr(F, "linear_cross_entropy"):
        since = "torch.nn.functional.linear_cross_entropy came with torch 2.13"
        raise AbsentError(f"{since}, and this is {torch.__version__}")
    options = getattr(torch.nn, "LinearCrossEntropyOptions", lambda: None)() if chunked else None
    words = {"ignore_index": IGNORE_INDEX, "options": options}
    return F.linear_cross_entropy(tempered(hidden_ND, problem), weight_VD, problem.targets_N, **words)


TRL_TILE = 8192
"""Vocabulary columns that TRL's function projects at a time; its tiles have 4096 rows."""


def trl_log_probs(hidden_ND: Tensor, weight_VD: Tensor, problem) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    tensors, temperature = (hidden_ND, weight_VD, None, problem.targets_N.clamp(min=0)), problem.case.temperature
    log_pi_N, *_ = ChunkedLogProbFunction.apply(*tensors, temperature, TRL_TILE, None, 1.0, ())
    return log_pi_N


def _trl_loss(hidden_ND: Tensor, weight_VD: Tensor, problem) -> Tensor:
    return gft_of_log_probs(trl_log_probs(hidden_ND, weight_VD, problem), problem)


def _liger_grpo(hidden_ND: Tensor, weight_VD: Tensor, problem) -> Tensor:
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

    case, shape_ST = problem.case, inputs.responses_of_one_length(problem.case)
    targets_ST = problem.targets_N.view(shape_ST)
    options = {"beta": 0.0, "loss_type": "bnpo", "use_ref_model": False, "temperature": case.temperature}
    value, _metrics = LigerFusedLinearGRPOLoss(**options, compiled=case.device == "cuda")(
        hidden_ND.view(*shape_ST, case.hidden),
        weight_VD,
        targets_ST.clamp(min=0),
        (targets_ST != IGNORE_INDEX).float(),
        problem.advantages_N.view(shape_ST)[:, 0].contiguous(),
    )
    return value


_LIGER = "liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"
_QUACK = "quack.linear_cross_entropy", "chunked_linear_cross_entropy"
PEERS = {
    "floor: three bare products": Peer(step=lambda p: bare_products(p.hidden_ND, p.weight_VD), objective=None),
    **{f"gft_linear_loss {backend}": Peer(partial(ours, backend)) for backend in BACKENDS},
    "gft_linear_loss, filter_eps": Peer(partial(ours, "auto", filter_eps=BFLOAT16_AUTO), limit=FILTERED_LIMIT),
    "eager PyTorch, lean": Peer(eager_loss),
    "torch.compile of lean": Peer(eager_loss, compiled=True),
    "F.linear_cross_entropy": Peer(_torch_cross_entropy, "cross-entropy"),
    "F.linear_cross_entropy, chunked": Peer(partial(_torch_cross_entropy, chunked=True), "cross-entropy"),
    "TRL chunked log-probabilities + 3 lines": Peer(_trl_loss, needs="trl.kernels.chunked_logprob"),
    "Liger fused linear GRPO": Peer(_liger_grpo, "grpo", "liger_kernel.chunked_loss.grpo_loss"),
    "Liger fused linear cross-entropy": cross_entropy(*_LIGER, chunk_mem_const=1),
    # by default Liger's chunk of logits is about as large as the hidden states; larger ones cost memory, save time
    "Liger fused linear cross-entropy, 8 × chunks": cross_entropy(*_LIGER, chunk_mem_const=8),
    "CCE": cross_entropy("cut_cross_entropy", "linear_cross_entropy"),
    "quack chunked linear cross-entropy": cross_entropy(*_QUACK),
}


def hidden_and_head_bytes(case) -> int:
    return (case.rows + case.vocab) * case.hidden * ITEM_BYTES[case.dtype]


KIND = Kind("loss and gradients over hidden states and output head", LinearCase, cases, build, PEERS, step_of,
            hidden_and_head_bytes, weighed=lambda timed, quick: timed[:1] if quick else timed)  # fmt: skip
