"""Sampling from a small GPT-2 on a CPU: the same distribution as `model.generate`, without its cost per token.

For a model of 0.1 M parameters generate spends most of its time outside the layers. This loop calls these alone and
keeps keys and values in one buffer. Sizes: P prompts, B = P · num_generations rows, T tokens, D width, H heads of
E = D/H.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from gft_kernels.trainer import Sampling
from gft_kernels.trainer.rollouts import cut

ROWS_AT_ONCE = 512  # keys and values of so many rows stay in cache


@torch.no_grad()
def sample_gpt2(model, prompts_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    """num_generations consecutive responses per prompt; a rollout function for GPT-2 without dropout.

    Raises: ValueError unless all prompts have the same length, which lets positions be counted without a mask.
    """
    lengths = sorted({len(ids) for ids in prompts_ids})
    if len(lengths) != 1:
        raise ValueError(f"prompts_ids must all have the same length, got lengths {lengths}; use trainer.generate.")
    rows_BT = torch.tensor(prompts_ids, device=model.device).repeat_interleave(sampling.num_generations, 0)
    tokens = [_continue(model, part_BT, sampling) for part_BT in rows_BT.split(ROWS_AT_ONCE)]
    return [cut(ids, sampling.eos_ids) for part in tokens for ids in part.tolist()]


def _continue(model, prompts_BT: Tensor, sampling: Sampling) -> Tensor:
    decoder = _Decoder(model, len(prompts_BT), prompts_BT.shape[1] + sampling.max_new_tokens)
    ends = torch.tensor(sampling.eos_ids, device=prompts_BT.device)
    done_B = torch.zeros(len(prompts_BT), dtype=torch.bool, device=prompts_BT.device)
    logits_BV = decoder.read(prompts_BT)
    tokens: list[Tensor] = []
    while True:
        if sampling.temperature > 0:
            token_B = torch.multinomial(torch.softmax(logits_BV / sampling.temperature, -1), 1).squeeze(1)
        else:
            token_B = logits_BV.argmax(-1)
        tokens.append(token_B)
        done_B = done_B | torch.isin(token_B, ends)
        if len(tokens) == sampling.max_new_tokens or bool(done_B.all()):
            return torch.stack(tokens, 1)
        logits_BV = decoder.read(token_B[:, None])


class _Decoder:
    """A GPT-2 that has read some tokens of every row, and reads more."""

    def __init__(self, model, rows: int, context: int):
        self.model, self.body = model, model.transformer
        shape = (rows, model.config.n_head, context, model.config.n_embd // model.config.n_head)
        self.keys, self.values = ([model.lm_head.weight.new_empty(shape) for _ in self.body.h] for _ in range(2))
        self.position = 0

    def read(self, tokens_BT: Tensor) -> Tensor:
        """Logits of the last position, (B, V)."""
        body, start = self.body, self.position
        self.position = start + tokens_BT.shape[1]
        x_BTD = body.wte.weight[tokens_BT] + body.wpe.weight[start : self.position]
        for layer in range(len(body.h)):
            x_BTD = self._layer(layer, x_BTD, start)
        return self.model.lm_head(body.ln_f(x_BTD[:, -1]))

    def _layer(self, layer: int, x_BTD: Tensor, start: int) -> Tensor:
        block, (B, T, D) = self.body.h[layer], x_BTD.shape
        heads, end = self.keys[layer].shape[1], start + T
        qkv = block.attn.c_attn(block.ln_1(x_BTD)).view(B, T, 3, heads, D // heads)
        q_BHTE, k_BHTE, v_BHTE = qkv.permute(2, 0, 3, 1, 4)
        self.keys[layer][:, :, start:end], self.values[layer][:, :, start:end] = k_BHTE, v_BHTE
        past = self.keys[layer][:, :, :end], self.values[layer][:, :, :end]
        mixed_BHTE = functional.scaled_dot_product_attention(q_BHTE, *past, is_causal=start == 0)
        x_BTD = x_BTD + block.attn.c_proj(mixed_BHTE.transpose(1, 2).reshape(B, T, D))
        return x_BTD + block.mlp(block.ln_2(x_BTD))
