"""How tests start processes: forked from a server that has imported what they need and done nothing else.

A fork of the tests' own process takes over whatever a thread holds at that moment, and may wait for it for ever.
"""

from __future__ import annotations

import multiprocessing

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch.distributed.fsdp", "transformers.trainer", "transformers.models.llama", "transformers.models.gpt2", "peft",
     "gft_kernels.cli", "gft_kernels.model", "gft_kernels.trainer"]
)  # fmt: skip
