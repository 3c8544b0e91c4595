"""An optimizer step over groups of responses, their prompts computed with every response or once a group.

The model has random weights and the shape of SmolLM2-135M; both contenders run it patched, in the same memory. Sizes:
G prompts of P tokens, S = G·K responses of R tokens, N = S·R rows of the head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Step
from benchmarks.kinds import linear
from benchmarks.kinds.inputs import normal_advantages
from benchmarks.kinds.kind import ITEM_BYTES, Case, Kind, Peer, whole_grid, words_of
from benchmarks.kinds.step import StepProblem, changing_parts, random_model, update_of


@dataclass(frozen=True)
class PromptCase(Case):
    """One measurement; every prompt and every response of a case is of one length."""

    prompt: int  # tokens
    response: int
    _: KW_ONLY
    groups: int = 2
    vocab: int = 49152
    hidden: int = 576
    layers: int = 30
    heads: int = 9
    dtype: str = "float32"
    responses: int = 8  # of all groups
    threads: int = 2

    def label(self) -> str:
        shape = f"{self.groups} prompts of {self.prompt}, {self.responses} responses of {self.response} tokens"
        model = f"{self.layers} layers × {self.hidden} × {self.vocab}"
        return ", ".join([f"{shape}, {model} {self.dtype}", *words_of(self)])

    def model(self) -> Any:
        """Raises ImportError without transformers."""
        from transformers import LlamaForCausalLM

        model = random_model(LlamaForCausalLM, self, self.hidden * 8 // 3, self.heads // 3 or 1)
        return model.to(getattr(torch, self.dtype))


def cases(device: str, *, quick: bool = False, threads: int = 1) -> list[PromptCase]:
    """Prompts eight times as long as responses, as long, and an eighth."""
    small = {"layers": 2, "hidden": 48, "heads": 3, "vocab": 4096} if quick else {}
    if device == "cpu":
        return [PromptCase(p, r, threads=threads, **small) for p, r in ((64, 8), (36, 36), (8, 64))]
    large = {"responses": 32, "groups": 4, "dtype": "bfloat16"}
    return [PromptCase(p, r, device=device, **large) for p, r in ((1024, 128), (576, 576), (128, 1024))]


@dataclass(frozen=True, kw_only=True)
class PromptProblem(StepProblem):
    """A patched model and two layouts of the same responses."""

    whole: dict[str, Tensor]
    shared: dict[str, Tensor]

    def hidden_of(self, model) -> Tensor:
        """The states that predict the responses' tokens, in rows of whole length."""
        hidden = model.model(input_ids=self.inputs_ST, use_cache=False).last_hidden_state
        return hidden[:, self.case.prompt - 1 : -1].flatten(0, 1)


def build(case: PromptCase) -> PromptProblem:
    from gft_kernels.model import patch_model, shared_prompts

    generator = torch.Generator(case.device).manual_seed(case.seed)
    model = patch_model(case.model(), objective="gft", tau=case.tau, temperature=case.temperature)
    drawn = partial(torch.randint, case.vocab, generator=generator, device=case.device)
    each = case.responses // case.groups
    prompts_GP, responses_SR = drawn((case.groups, case.prompt)), drawn((case.responses, case.response))
    groups = list(zip(prompts_GP.tolist(), responses_SR.view(case.groups, each, -1).tolist(), strict=True))
    inputs, targets_SR = shared_prompts.layout(groups, pad_id=0)
    rows = torch.cat([prompts_GP.repeat_interleave(each, 0), responses_SR], 1)
    # the row that ends a response predicts nothing; of the rows that are kept, the head computes those with a target
    aligned = torch.cat([responses_SR, responses_SR.new_full((case.responses, 1), -100)], 1)
    whole = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "shift_labels": aligned}
    advantages_S = normal_advantages(case, generator)
    shared = {name: value.to(case.device) for name, value in {**inputs, "shift_labels": targets_SR}.items()}
    return PromptProblem(
        case=case,
        **changing_parts(model),
        inputs_ST=rows,
        targets_N=responses_SR.flatten(),
        advantages_N=advantages_S.repeat_interleave(case.response),
        whole={**whole, "logits_to_keep": case.response + 1, "gft_advantages": advantages_S},
        shared={**shared, "gft_advantages": advantages_S},
    )


def step_of(layout: Callable[[PromptProblem], dict[str, Tensor]], problem: PromptProblem) -> Step:
    """Forward, backward and update of one layout."""
    return update_of(lambda: problem.model(**layout(problem)).loss, problem)


def _floor(problem: PromptProblem) -> Step:
    """What sharing cannot save: every token once through the layers, the head's products and the update."""
    trunk, tokens = problem.case.model().model, [problem.shared[name] for name in ("gft_prompt_ids", "input_ids")]
    gradients = [torch.randn(*ids.shape, problem.case.hidden).to(trunk.device, trunk.dtype) for ids in tokens]
    products = linear.bare_products(gradients[1].flatten(0, 1), problem.weight_VD)
    optimizer = torch.optim.AdamW(trunk.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        products()
        for ids, gradient in zip(tokens, gradients, strict=True):
            trunk(input_ids=ids, use_cache=False).last_hidden_state.backward(gradient)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


PEERS = {
    "floor: each token once, three bare products, update": Peer(step=_floor, objective=None),
    "gft_linear_loss, whole rows": Peer(lambda problem: problem.whole),
    "gft_linear_loss, each prompt once": Peer(lambda problem: problem.shared),
}

KIND = Kind("an optimizer step over groups, whole rows or each prompt once", PromptCase, cases, build, PEERS, step_of,
            lambda case: case.vocab * case.hidden * ITEM_BYTES[case.dtype], weighed=whole_grid)  # fmt: skip
