"""Fused loss and gradient kernels for Group Fine-Tuning (GFT, arXiv 2604.14258) over large vocabularies."""

from gft_kernels.advantages import group_advantages
from gft_kernels.api import GFTLinearLoss, GFTLoss, gft_linear_loss, gft_loss, policy_loss, token_log_probs
from gft_kernels.importance import importance_weights
from gft_kernels.options import BackendUnavailable, TokenStats

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "GFTLinearLoss",
    "GFTLoss",
    "TokenStats",
    "gft_linear_loss",
    "gft_loss",
    "group_advantages",
    "importance_weights",
    "policy_loss",
    "token_log_probs",
]
