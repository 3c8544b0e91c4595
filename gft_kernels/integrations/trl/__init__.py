"""TRL's trainers with the GFT loss: `GFTTrainer` is its GRPOTrainer on hybrid groups, `GFTSFTTrainer` its SFTTrainer.

Needs the extra `trl` (TRL 1.15 or later). User guide: docs/integrations/trl.md.
"""

from gft_kernels.integrations.trl.config import GFTConfig, GFTSFTConfig
from gft_kernels.integrations.trl.grpo import GFTTrainer
from gft_kernels.integrations.trl.sft import GFTSFTTrainer

__all__ = ["GFTConfig", "GFTSFTConfig", "GFTSFTTrainer", "GFTTrainer"]
