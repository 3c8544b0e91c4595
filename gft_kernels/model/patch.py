"""`patch_model`: a Hugging Face causal language model that returns the GFT loss and never holds its logits.

Given labels, the patched model computes the loss inside the call of its output head (head.py), and so inside
whatever wraps the model: DDP and FSDP reduce the gradients as they would of any loss. Without labels nothing changes,
except that training on the logits is refused.

Sizes: S responses (rows of the batch), L tokens of a row, T rows of it the head sees, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from gft_kernels.api import policy_loss
from gft_kernels.arguments import completed
from gft_kernels.model.columns import PER_CALL
from gft_kernels.model.extra_terms import reduction_of
from gft_kernels.model.forward import OF_THE_MODEL, PatchedForward, refuse
from gft_kernels.model.guard import PREFIX
from gft_kernels.objectives import PRESETS


def patch_model(
    model: nn.Module, *, head: str | None = None, eval_logits: bool = False, **loss_options: Any
) -> nn.Module:
    """Let a causal language model return the GFT loss (F6) of its labels, or another objective's, from inside its head.

    The model, changed where it stands, then takes `labels` (S, L) int64 as before (position t is predicted from t - 1;
    -100 does not count), or `shift_labels` (S, T) aligned with the rows its head sees; `num_items_in_batch`; and any
    option of `policy_loss` under its name with `gft_` before it, for this call alone: `gft_advantages` (S,) or of
    the shape of the labels, or `gft_rewards` (S,) with `gft_group_size` or `gft_group_ids`; `gft_mask`,
    `gft_old_log_probs` and `gft_ref_log_probs` of the shape of the labels; `gft_sequence_ids` of the shape of the
    labels, which makes the batch packed rows; `gft_return_stats`.
    It returns its own output class with `loss` and without logits (with statistics asked for: also `stats`).
    Logit scale, softcap and bias are the model's own. Terms the model adds to its loss (a router's) are weighed by the
    batch's share of the step. Without labels the model is as it was, but for training calls with gradients, which
    raise, as does every call whose labels or columns do not reach the loss. Patching again replaces the patch.

    Args:
        model: a transformers causal language model; wrapped by PEFT or DDP, the model inside is changed.
        head: the name of the output head, if it is not what `get_output_embeddings()` returns.
        eval_logits: return logits beside the loss while `model.training` is False, for metrics that are made from them.
        loss_options: options of `policy_loss` for every call, such as tau=0.7, or objective="grpo" and clip_high=0.28.

    Returns: model. Raises: ValueError, TypeError. Warns once (UserWarning), with the reason, if the loss must be
    computed from the logits after all. Source: docs/integrations/huggingface.md.
    """
    inner = unwrapped(model)
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"model must be a decoder-only language model, got the encoder-decoder {type(inner).__name__}; "
            "pass its logits to gft_loss"
        )
    completed(policy_loss, loss_options)  # refuses a name that it does not know
    refuse(loss_options, OF_THE_MODEL, "", "be left to the model, got a value; leave it out")
    refuse(loss_options, PER_CALL, "", f"come with each call, got a value for all; pass {PREFIX}<name>= to the model")
    if "_gft_forward" in inner.__dict__:
        unpatch_model(inner)
    forward = PatchedForward(inner, head, loss_options, eval_logits)
    if model is not inner:
        forward.guard.watch(model)
    inner._gft_forward = inner.forward = forward
    # transformers.Trainer hands over its count of label tokens only if told so; it is the denominator of this mean.
    preset, mean = PRESETS.get(loss_options.get("objective", "gft")), reduction_of(loss_options)
    inner.accepts_loss_kwargs = mean == "token-mean" and preset is not None and not preset.constant_denominator
    return model


def unpatch_model(model: nn.Module) -> nn.Module:
    """Undo `patch_model`; returns model. Raises ValueError if it is not patched."""
    inner = unwrapped(model)
    forward = inner.__dict__.get("_gft_forward")
    if forward is None:
        raise ValueError("model must have been patched by patch_model, got one that was not; there is nothing to undo")
    del inner._gft_forward
    forward.guard.remove()
    for name, before in forward.replaced.items():
        if name == "forward" and inner.__dict__.get("forward") is not forward:
            continue  # wrapped by another library since; without its `_gft_forward` the patch only passes calls on
        if before is None:
            delattr(inner, name)
        else:
            setattr(inner, name, before)
    return model


def unwrapped(model: nn.Module) -> Any:
    """The language model inside torch.compile, DDP or FSDP, and PEFT."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}; load it first")
    inner: Any = model
    while True:
        children: dict[str, Any] = dict(inner.named_children())
        wrapped = [children[name] for name in ("_orig_mod", "module", "_fsdp_wrapped_module") if name in children]
        if wrapped:
            inner = wrapped[0]
        elif hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        else:
            return inner
