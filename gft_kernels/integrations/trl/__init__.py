"""TRL's trainers with the GFT loss: `GFTGRPOTrainer`, its GRPOTrainer on hybrid groups, and `GFTSFTTrainer`.

Needs the extra `trl` (TRL 1.15 or later). User guide: docs/integrations/trl.md. A folder, for a host with two trainers:
config.py is their options, grpo.py and sft.py a trainer each, patch.py what both ask of the model and log.
"""

import warnings
from typing import Any

from gft_kernels.integrations.trl.config import GFTGRPOConfig, GFTSFTConfig
from gft_kernels.integrations.trl.grpo import GFTGRPOTrainer
from gft_kernels.integrations.trl.sft import GFTSFTTrainer

__all__ = ["GFTGRPOConfig", "GFTGRPOTrainer", "GFTSFTConfig", "GFTSFTTrainer"]

_RENAMED = {"GFTConfig": GFTGRPOConfig, "GFTTrainer": GFTGRPOTrainer}


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    now = _RENAMED[name]
    warnings.warn(f"gft_kernels.integrations.trl.{name} is now called {now.__name__}", DeprecationWarning, stacklevel=2)
    return now
