"""Fused loss and gradient kernels for Group Fine-Tuning (GFT, arXiv 2604.14258) over large vocabularies."""

from gft_kernels.advantages import group_advantages
from gft_kernels.linear_loss import GFTLinearLoss, gft_linear_loss, token_log_probs
from gft_kernels.loss import GFTLoss, gft_loss
from gft_kernels.options import BackendUnavailable, TokenStats
from gft_kernels.policy import policy_loss

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "GFTLinearLoss",
    "GFTLoss",
    "TokenStats",
    "gft_linear_loss",
    "gft_loss",
    "group_advantages",
    "policy_loss",
    "token_log_probs",
]
