"""`patch_model` and `unpatch_model` under the name of their host, Hugging Face transformers."""

from gft_kernels.model import patch_model, unpatch_model

__all__ = ["patch_model", "unpatch_model"]
