"""Loss terms a model returns beside its logits (a router's load balance, say), and their share of a step.

A term belongs to its micro-batch, so it is added to the loss of each of the micro-batch's tokens and divided with them:
over a step, whichever way it is cut, the terms of its micro-batches are weighed by their tokens (by their responses,
where the loss is a mean over those) and the weights sum to 1. A micro-batch without a label weighs nothing. The weighed
terms themselves are the whole step's where a term is a mean over positions that are as many for each token; a load
balance, a product of two such means, depends on the cut. With reduction "sum" the weights sum to the tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gft_kernels.objectives import PRESETS


def extra_terms(model: Any, output: Any) -> Tensor | None:
    """What the model would add to the loss of its labels; None: nothing. Raises ValueError for a term without weight.

    `output` is what the model returned without labels: a loss in it is the model's own, whatever else ends in `_loss`
    is weighed by the model's config.
    """
    if weight := getattr(model, "z_loss_coefficient", None):  # bamba's, which it adds where it has labels, unreturned
        raise ValueError(
            f"z_loss_coefficient of {type(model).__name__} must be 0, got {weight}; set it to 0: the term is of the "
            "model's own loss alone"
        )
    terms = [output.loss] if output.get("loss") is not None else []
    for name, value in output.items():
        if name.endswith("_loss") and isinstance(value, Tensor):
            terms.append(weight_of(model, name) * value)
    return sum(term.to(terms[0].device) for term in terms) if terms else None


def weight_of(model: Any, term: str) -> float:
    """What the model would multiply its `term` by before adding it to the loss of its labels."""
    names = (f"router_{term}_coef", f"{term}_coef")
    for owner in (model, model.config.get_text_config(decoder=True)):
        for name in names:
            if hasattr(owner, name):
                return float(getattr(owner, name))
    raise ValueError(
        f"{term} must have a weight in the config of {type(model).__name__}, got none under {' or '.join(names)}; "
        "set one, or switch the term off (output_router_logits=False for a router's)"
    )


def reduction_of(options: dict[str, Any]) -> str | None:
    """The reduction that options of `policy_loss` come to; None: of an objective it does not know."""
    preset = PRESETS.get(options.get("objective", "gft"))
    return options.get("reduction") or (None if preset is None else preset.reduction)


def share(targets: Tensor, options: dict[str, Any]) -> Tensor:
    """The loss the micro-batch would have if each of its tokens had a loss of 1: () float32, or of targets' shape.

    targets (S, T) or packed (R,), options of `policy_loss` aligned with them.
    """
    live = targets != options.get("ignore_index", -100)
    if options.get("mask") is not None:
        live = live & options["mask"].bool()
    reduction = reduction_of(options)
    if reduction == "none":
        return live.float()
    count = live.sum()
    if reduction == "sequence-mean":
        ids = options.get("sequence_ids")
        count = live.any(-1).sum() if ids is None else torch.tensor(len(torch.unique(ids[live])), device=live.device)
    if reduction == "sum":
        return count.float()
    items = options.get("num_items_in_batch")
    return (count > 0).float() if items is None else count.float() / torch.as_tensor(items, device=count.device)
