"""An optimizer step of a small model: forward, a loss, backward, update.

The weights of a Qwen2-shaped model are random, but the final norm is scaled so that its predictions are as sharp as a
trained one's, and three targets of four are what it predicts: both sides of τ occur. Or the model is SmolLM2-135M,
which reads chats with their answers. Sizes: S responses of T tokens, N = S·T rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import cache, cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import CHECK_UPSTREAM, Answer, Deviation, Step
from benchmarks.kinds import linear, row
from benchmarks.kinds.inputs import normal_advantages, peak_tokens
from benchmarks.kinds.kind import BACKENDS, ITEM_BYTES, Case, Kind, Peer, Rows, whole_grid, words_of
from benchmarks.kinds.truth import coefficients
from gft_kernels.data import dates, pretrained, text

ERROR_LIMIT = {"float32": 5e-3, "bfloat16": 1e-1}
SHARPNESS = 16.0
"""Of the final norm: logits of a standard deviation of about 5."""


@dataclass(frozen=True)
class StepCase(Case):
    """One measurement of an optimizer step; embeddings are tied, weights random or `pretrained`, SmolLM2-135M's."""

    tokens: int  # of each response
    _: KW_ONLY
    vocab: int = row.HEADLINE_VOCABULARY
    hidden: int = 256
    layers: int = 2
    heads: int = 4
    dtype: str = "float32"
    responses: int = 4
    threads: int = 2
    pretrained: bool = False

    @property
    def rows(self) -> int:
        return self.responses * self.tokens

    def model(self) -> Any:
        """Raises ImportError without transformers, ValueError with the remedy where a pretrained model is not here."""
        from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

        if self.pretrained:
            found = AutoModelForCausalLM.from_pretrained(pretrained.located("smollm2"), dtype=torch.float32)
            return found.to(self.device)
        return random_model(Qwen2ForCausalLM, self, 4 * self.hidden, max(1, self.heads // 2))

    def label(self) -> str:
        model = "SmolLM2-135M" if self.pretrained else f"{self.layers} layers × {self.hidden} × {self.vocab}"
        return ", ".join([f"step of {self.responses} × {self.tokens} tokens, {model} {self.dtype}", *words_of(self)])


def cases(device: str, *, quick: bool = False, threads: int = 1) -> list[StepCase]:
    """A model small enough for a CPU under the headline vocabulary."""
    if device == "cpu":
        return [StepCase(32 if quick else 64, hidden=64 if quick else 256, threads=threads)]
    return [StepCase(128 if quick else 2048, hidden=896, layers=4, heads=14, dtype="bfloat16", device=device)]


def pretrained_sweep(device: str, threads: int = 2) -> list[StepCase]:
    """SmolLM2-135M."""
    shape: dict[str, Any] = {"vocab": 49152, "hidden": 576, "layers": 30, "heads": 9, "pretrained": True}
    if device == "cpu":
        return [StepCase(64, threads=threads, **shape)]
    return [StepCase(2048, device=device, dtype="bfloat16", **shape)]


@dataclass(frozen=True, kw_only=True)
class StepProblem(Rows):
    """Weights that each step changes and `prepare` puts back."""

    model: Any  # Qwen2ForCausalLM
    pristine: list[Tensor]  # the weights before a step
    optimizer: torch.optim.Optimizer
    inputs_ST: Tensor
    limits = ERROR_LIMIT

    @property
    def weight_VD(self) -> Tensor:
        """The output head, which is the embedding too."""
        return self.model.lm_head.weight

    def hidden_of(self, model) -> Tensor:
        """The last hidden states (N, D) of the batch, with their graph."""
        return _hidden(model, self.inputs_ST)

    def parameters(self) -> list[Tensor]:
        return list(self.model.parameters())

    def prepare(self, upstream: float) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.parameters(), self.pristine)
        super().prepare(upstream)

    @cached_property
    def truth(self) -> Callable[[str], tuple[float, float, list[Tensor]]]:
        """By objective: the loss, the mean of the rows' absolute losses, the gradients. Kept for all contenders."""
        return cache(self._fp64_step)

    def _fp64_step(self, objective: str) -> tuple[float, float, list[Tensor]]:
        model = self.case.model().double()  # the same again, not patched
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), [weight.double() for weight in self.pristine])
        logits_NV = self.hidden_of(model) @ model.lm_head.weight.t() / self.case.temperature
        log_pi_N = logits_NV.log_softmax(1).gather(1, self.targets_N[:, None])[:, 0]
        kappa_N, loss_N = coefficients(log_pi_N.detach(), self.advantages_N.double(), objective, self.case.tau)
        (-(kappa_N * log_pi_N).mean() * CHECK_UPSTREAM).backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        return loss_N.mean().item(), loss_N.abs().mean().item(), gradients

    def deviation(self, answer: Answer, objective: str) -> Deviation:
        """Of the loss, and of each weight's gradient as a whole."""
        loss, size, truths = self.truth(objective)
        gaps = [(mine.double() - its).norm() / its.norm() for mine, its in zip(answer.gradients, truths, strict=True)]
        gaps.append((answer.loss.double() - loss).abs() / size)
        *of_gradients, of_loss = (gap.nan_to_num(nan=float("inf")).item() for gap in gaps)
        return Deviation(max(*of_gradients, of_loss), max(of_gradients))


def _hidden(model, inputs_ST: Tensor) -> Tensor:
    return model.model(input_ids=inputs_ST, use_cache=False).last_hidden_state.flatten(0, 1)


def random_model(kind: Any, case, intermediate_size: int, key_value_heads: int):
    """A model of the case's sizes whose predictions are as sharp as a trained one's."""
    torch.manual_seed(case.seed)
    config = kind.config_class(
        vocab_size=case.vocab,
        hidden_size=case.hidden,
        intermediate_size=intermediate_size,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=key_value_heads,
        tie_word_embeddings=True,
    )
    model = kind(config)
    with torch.no_grad():
        model.model.norm.weight.fill_(SHARPNESS)
    return model.to(case.device)


def changing_parts(model) -> dict[str, Any]:
    """What a step changes, for a StepProblem, and how it is put back."""
    # so small a rate that the check's step and the timed ones see the same weights within rounding
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    return {"model": model, "pristine": [p.detach().clone() for p in model.parameters()], "optimizer": optimizer}


def chats(count: int, tokens: int) -> Tensor:
    """(count, tokens) ids of SmolLM2's chats about dates, prompts and right answers one after the other."""
    from transformers import AutoTokenizer

    tokenizer, ids = AutoTokenizer.from_pretrained(pretrained.located("smollm2")), []
    for chat in dates.records(1 + count * tokens // 32, "test", seed=2):  # none is shorter than 32 tokens
        prompt = text.encode_prompt(tokenizer, chat["prompt"])
        ids += prompt + text.encode_response(tokenizer, chat["demonstrations"][0], chat["prompt"], prompt)
    return torch.tensor(ids[: count * tokens]).view(count, tokens)


def build(case: StepCase) -> StepProblem:
    generator = torch.Generator(case.device).manual_seed(case.seed)
    model = case.model().to(getattr(torch, case.dtype))
    if case.pretrained:
        tokens_ST = chats(case.responses, case.tokens + 1).to(case.device)
        inputs_ST, targets_N = tokens_ST[:, :-1], tokens_ST[:, 1:].flatten()
    else:
        inputs_ST = torch.randint(case.vocab, (case.responses, case.tokens), generator=generator, device=case.device)
        with torch.no_grad():
            blocks = _hidden(model, inputs_ST).split(256)
            likely_N = torch.cat([(block @ model.lm_head.weight.t()).argmax(1) for block in blocks])
        targets_N = peak_tokens(likely_N, case.vocab, generator)
    return StepProblem(
        case=case,
        **changing_parts(model),
        inputs_ST=inputs_ST,
        targets_N=targets_N,
        advantages_N=normal_advantages(case, generator).repeat_interleave(case.tokens),
    )


def step_of(loss: Callable[[Tensor, Tensor, Any], Tensor], problem: StepProblem) -> Step:
    """Forward, backward and update under a loss over hidden states and head."""
    return update_of(lambda: loss(problem.hidden_of(problem.model), problem.weight_VD, problem), problem)


def update_of(loss: Callable[[], Tensor], problem: StepProblem) -> Step:
    """A loss, its backward and the optimizer's update."""

    def step() -> Answer:
        value = loss()
        value.backward(problem.upstream.to(value.dtype))
        problem.optimizer.step()
        gradients = tuple(parameter.grad for parameter in problem.parameters())
        problem.optimizer.zero_grad(set_to_none=True)
        return Answer(value.detach(), gradients)

    return step


# Contenders: everyone's way from hidden states to a loss, under one model and one optimizer.


def _floor(problem: StepProblem) -> Step:
    """What no loss can save: the model's own passes, the head's products and the update."""
    dhidden_ND = problem.hidden_of(problem.model).detach()  # any numbers of that shape
    products = linear.bare_products(dhidden_ND, problem.weight_VD)

    def step() -> None:
        hidden_ND = problem.hidden_of(problem.model)
        products()
        hidden_ND.backward(dhidden_ND)
        problem.optimizer.step()
        problem.optimizer.zero_grad(set_to_none=True)

    return step


def _over_logits(loss: Callable, hidden_ND: Tensor, weight_VD: Tensor, problem: StepProblem) -> Tensor:
    """A loss over the whole logits, as the model's own head makes them."""
    return loss(F.linear(hidden_ND, weight_VD), problem)


SERVING = [backend for backend in BACKENDS if backend != "reference"]
# the chunked cross-entropy takes 14 times as long as everyone else, and is in the linear benchmark
LEFT_OUT = ("floor: three bare products", "F.linear_cross_entropy, chunked", "gft_linear_loss reference")
PEERS = {
    "floor: model, three bare products, update": Peer(step=_floor, objective=None),
    **{f"gft_loss {b}, in place": Peer(partial(_over_logits, partial(row.ours, b, True))) for b in SERVING},
    "eager PyTorch, paper's formulation": Peer(partial(_over_logits, row.paper_loss)),
    # ours where memory matters more than time
    **{f"gft_linear_loss {b}, chunks of 64": Peer(partial(linear.ours, b, chunk_rows=64)) for b in SERVING},
    **{name: peer for name, peer in linear.PEERS.items() if name not in LEFT_OUT},
}

KIND = Kind("an optimizer step of a small model", StepCase, cases, build, PEERS, step_of,
            lambda case: case.vocab * case.hidden * ITEM_BYTES[case.dtype], weighed=whole_grid)  # fmt: skip
