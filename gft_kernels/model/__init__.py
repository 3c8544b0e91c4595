"""What makes a Hugging Face causal language model compute the loss in its head."""

from gft_kernels.model.patch import patch_model, unpatch_model

__all__ = ["patch_model", "unpatch_model"]
