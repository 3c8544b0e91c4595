"""The contract of the linear loss: a call as its operator sees it, and what comes back.

Sizes: S responses, T positions per padded response, R = S·T rows (packed: S = 1, T = R), D hidden size, V vocabulary
(of this rank's shard, where the head is sharded).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gft_kernels.options import Credit, Objective


@dataclass(frozen=True)
class LinearCall:
    """One loss over hidden states and an output head: logits = hidden @ weight^T + bias, never all at once."""

    hidden_STD: Tensor  # float32, bfloat16 or float16; any strides
    weight_VD: Tensor  # one of the same dtypes
    bias_V: Tensor | None
    credit: Credit
    objective: Objective = field(default_factory=Objective)
    logit_scale: float = 1.0  # this and the next five as in RowCall
    softcap: float = 0.0
    temperature: float = 1.0
    want_stats: bool = False
    want_entropy: bool = False
    process_group: str = ""
    chunk_rows: int = 0  # rows of logits held at a time; 0: chunks.chunk_rows decides
    product_dtype: torch.dtype = torch.float32  # what hidden and weight are rounded to before they are multiplied
    logits_dtype: torch.dtype = torch.float32
    accum_dtype: torch.dtype = torch.float32  # of the gradients' sums
    want_hidden: bool = False  # which gradients: a product each
    want_weight: bool = False
    want_bias: bool = False

    @property
    def want_gradient(self) -> bool:
        return self.want_hidden or self.want_weight or self.want_bias


@dataclass(frozen=True)
class LinearResult:
    """Per-row tensors are float32 (R,); gradients are in accum_dtype, not yet times the upstream gradient, or None."""

    loss: Tensor  # () float32; (R,) for reduction "none"
    log_probs_R: Tensor
    coefficients_R: Tensor
    advantages_R: Tensor
    entropy_R: Tensor | None
    hidden_gradient_RD: Tensor | None
    weight_gradient_VD: Tensor | None
    bias_gradient_V: Tensor | None
    unit: Tensor | None  # () float32 the gradients must still be multiplied by; None: 1
