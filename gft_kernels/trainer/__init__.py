"""The thin trainer: hybrid groups of expert, teacher and sampled responses on top of transformers.Trainer.

Needs the extra `train` (transformers, accelerate, datasets, tokenizers, matplotlib, pyyaml, pyarrow).
User guide: docs/training.md.
"""

from gft_kernels.data.readers import Record, RowError, read_records
from gft_kernels.trainer.checkpoints import SaveOnInterrupt
from gft_kernels.trainer.config import GFTConfig
from gft_kernels.trainer.logs import RunLog
from gft_kernels.trainer.rewards import RewardError
from gft_kernels.trainer.rollouts import Sampling, generate
from gft_kernels.trainer.trainer import GFTTrainer

__all__ = [
    "GFTConfig",
    "GFTTrainer",
    "Record",
    "RewardError",
    "RowError",
    "RunLog",
    "Sampling",
    "SaveOnInterrupt",
    "generate",
    "read_records",
]
