"""A prompt computed once for all of its responses: what a patched model does with `gft_prompt_ids`, and who may ask.

The trunk runs on the prompts without their last tokens and keeps keys and values with their graph; the model then runs
on the responses, each behind the last token of its prompt, which predicts the first of it. Every layer reads the keys
and values of its row's prompt, so their gradients, summed over the responses, flow back through the prompt. Loss and
gradients are those of whole rows but for rounding (prefix sharing, arXiv 2506.05433, by a cache instead of a kernel).

Sizes: G prompts, S responses, P tokens of the longest prompt but its last, R tokens of the longest response.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from gft_kernels import checks

PROMPT_IDS, PROMPT_OF = ARGUMENTS = ("prompt_ids", "prompt_of")
NOISE = ("drop", "jitter", "noise")  # in the names of what layers draw at random in training
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}  # of logits, relative; of smaller types ROUNDED
ROUNDED = 0.15

Ids = Sequence[int]


def layout(groups: Sequence[tuple[Ids, Sequence[Ids]]], pad_id: int) -> tuple[dict[str, Tensor], Tensor]:
    """Prompts (none empty), each with its responses, as (inputs of a patched model, targets (S, R)).

    input_ids (S, R): the prompt's last token and the response without its own; attention_mask (S, P + R);
    gft_prompt_ids (G, P), right-padded; gft_prompt_of (S,): the row of gft_prompt_ids behind each response. targets:
    the responses, -100 on padding; what the model takes as shift_labels. Groups without responses are left out.
    """
    groups = [(prompt, responses) for prompt, responses in groups if responses]
    pairs = [(g, prompt, response) for g, (prompt, responses) in enumerate(groups) for response in responses]
    longest = max(len(prompt) for prompt, _ in groups) - 1
    before = [torch.tensor(prompt[:-1], dtype=torch.int64) for prompt, _ in groups]
    before.append(torch.zeros(max(longest, 1), dtype=torch.int64))  # left out again: P is at least 1
    length_S = torch.tensor([len(prompt) - 1 for _, prompt, _ in pairs])
    prompt_ids = pad_sequence(before, True, pad_id)[:-1]
    on_prompt = torch.arange(prompt_ids.shape[1]) < length_S[:, None]
    texts = [torch.tensor([prompt[-1], *response[:-1]]) for _, prompt, response in pairs]
    on_text = pad_sequence([torch.ones_like(text) for text in texts], True)
    inputs = {
        "input_ids": pad_sequence(texts, True, pad_id),
        "attention_mask": torch.cat([on_prompt.long(), on_text], 1),
        f"gft_{PROMPT_IDS}": prompt_ids,
        f"gft_{PROMPT_OF}": torch.tensor([g for g, _, _ in pairs]),
    }
    return inputs, pad_sequence([torch.tensor([*response]) for _, _, response in pairs], True, -100)


def taken(named: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Takes the prompts out of a call's `gft_` arguments. Raises ValueError for one of the two without the other."""
    prompt_ids, prompt_of = (named.pop(name, None) for name in ARGUMENTS)
    if (prompt_ids is None) != (prompt_of is None):
        absent = PROMPT_IDS if prompt_ids is None else PROMPT_OF
        raise ValueError(f"gft_{absent} must be given where the other of the two is, got None; layout() makes both")
    return None if prompt_ids is None or prompt_of is None else (prompt_ids, prompt_of)


def behind_prompts(model: Any, kwargs: dict[str, Any], prompt_ids_GP: Tensor, prompt_of_S: Tensor) -> dict[str, Any]:
    """A call's arguments with the prompts' keys and values in them. Raises ValueError for tensors that do not fit."""
    mask, (S, R), P = kwargs.get("attention_mask"), kwargs["input_ids"].shape, prompt_ids_GP.shape[1]
    if mask is None or mask.shape != (S, P + R) or prompt_of_S.shape != (S,):
        raise ValueError(
            f"attention_mask must be ({S}, {P + R}) and gft_prompt_of ({S},) with gft_prompt_ids of width {P}, got "
            f"{None if mask is None else tuple(mask.shape)} and {tuple(prompt_of_S.shape)}; layout() makes them"
        )
    if kwargs.get(cache_name(model)) is not None:
        raise ValueError(f"{cache_name(model)} must be left out with gft_prompt_ids, got a value; pass whole rows")
    rising_S = (mask[:, 1:P].long() > mask[:, : P - 1].long()).any(1)
    if checks.can_be_read(rising_S) and rising_S.any():
        raise ValueError(
            "gft_prompt_ids must be padded on the right, got an attention_mask that begins behind padding in row "
            f"{int(rising_S.nonzero()[0])}; layout() makes both"
        )
    kwargs = {**kwargs, cache_name(model): expanded(prompts_cache(model, prompt_ids_GP), prompt_of_S)}
    kwargs["use_cache"] = True  # some families do not look at a cache otherwise
    if "position_ids" in inspect.signature(type(model).forward).parameters:
        # Padding repeats the position before it: one of its own might lie beyond a table of positions.
        kwargs.setdefault("position_ids", (mask.long().cumsum(1) - 1).clamp(min=0)[:, P:])
    return kwargs


def cache_name(model: Any) -> str:
    """What a model calls its keys and values, as an argument and in its output: `cache` since transformers 5.24."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def prompts_cache(model: Any, prompt_ids_GP: Tensor) -> Any:
    """Keys and values of right-padded prompts. Nothing is masked: under causality no token sees the padding behind."""
    mask = torch.ones_like(prompt_ids_GP)  # without one, families that find padding advise to pass one
    output = model.base_model(input_ids=prompt_ids_GP, attention_mask=mask, use_cache=True, return_dict=True)
    return output[cache_name(model)]


def expanded(cache: Any, prompt_of_S: Tensor) -> Any:
    """The cache of G prompts as one of S responses, which keeps nothing of these and may be read again."""
    for layer in cache.layers:
        layer.update = functools.partial(joined, layer, prompt_of_S)
    return cache


def joined(layer: Any, prompt_of_S: Tensor, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
    """Keys and values of each row's prompt and response; instead of a cache layer's `update`."""
    pairs = ((layer.keys, keys), (layer.values, values))
    before, after = (torch.cat([old.index_select(0, prompt_of_S), new], -2) for old, new in pairs)
    return before, after


def with_copied_cache(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments for a run after which there may be another: that one finds the cache as it came.

    A shallow copy, which keeps the graph of keys and values. Raises ValueError for layers that write over theirs.
    """
    name = cache_name(model)
    if (cache := kwargs.get(name)) is None:
        return kwargs
    kinds = {type(layer).__name__ for layer in getattr(cache, "layers", [cache])}  # of another cache, its own name
    if over := sorted(kind for kind in kinds if not kind.startswith("Dynamic")):
        raise ValueError(
            f"{name} must be left out of the first call with labels of {type(model).__name__}, got one of "
            f"{', '.join(over)}, which is written over; make one call without it before"
        )
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return {**kwargs, name: twin}


# Who may ask


def refuse(model: Any, tried: bool, forward: Callable[..., Any]) -> None:
    """Raises ValueError, with the reason, for a model that cannot, or not now; tries it out where that was not done."""
    reason = refusal_of_cache(model) or refusal_of_loss(model, model.training)
    if reason is None and not tried:
        reason = refusal_of_trial(model, forward)
    if reason is not None:
        raise ValueError(f"gft_prompt_ids must be left out, got a value; {reason}: pass whole rows")


def refusal_of_cache(model: Any) -> str | None:
    """Why the model's keys and values cannot be those of another call's prompt, as far as can be read off it."""
    from transformers import DynamicCache

    kind, config = type(model).__name__, model.config.get_text_config(decoder=True)
    if any(hasattr(p, "ds_id") or hasattr(p, "placements") for p in model.parameters()):
        return f"the weights of {kind} lie in parts on all ranks, gathered for one call of a layer"
    if getattr(model, "base_model", model) is model:
        return f"{kind} has no trunk that could be run without its head"
    layers = {type(layer).__name__ for layer in DynamicCache(config=config).layers} - {"DynamicLayer"}
    # What the trial cannot see: its rows are shorter than a window, or the length at which positions change.
    layers |= {"local" for module in model.modules() if getattr(module, "attention_type", None) == "local"}
    if layers:
        return f"{kind} has layers other than full attention ({', '.join(sorted(layers))})"
    if moving := sorted(rope for rope in rotary_types(model) if "dynamic" in rope or rope == "longrope"):
        return f"{kind}'s rotary positions depend on the longest row of a call ({', '.join(moving)})"
    return None


def rotary_types(model: nn.Module) -> set[str]:
    """How the model's layers stretch their rotary positions; some have several, by kind of layer."""
    found = [getattr(module, "rope_type", "default") for module in model.modules()]
    return {name for types in found for name in (types.values() if isinstance(types, dict) else [types])}


def refusal_of_loss(model: Any, training: bool) -> str | None:
    """Why the loss of whole rows, in training or not, would be another than that of shared prompts."""
    if training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return "gradient checkpointing runs layers again without their cache"
    if training and (noise := next(noises(model), None)):
        return f"{type(model).__name__} draws at random for each row in training ({noise})"
    configs = (model.config, model.config.get_text_config(decoder=True))
    if any(getattr(config, "output_router_logits", False) for config in configs):
        return "the router's loss counts the tokens of whole rows (output_router_logits)"
    return None


def noises(model: nn.Module) -> Iterator[str]:
    """What layers draw at random in training: dropout, as modules or as numbers, jitter, noise."""
    for path, module in model.named_modules():
        named = {f"{path}.p" if path else "p": module.p} if isinstance(module, nn.modules.dropout._DropoutNd) else {}
        named |= {f"{path}.{name}": value for name, value in vars(module).items() if any(n in name for n in NOISE)}
        yield from (f"{name} = {value}" for name, value in named.items() if isinstance(value, float) and value > 0)


@torch.no_grad()
def refusal_of_trial(model: Any, forward: Callable[..., Any] | None = None) -> str | None:
    """Why two prompts of different lengths, two responses each, differ from whole rows by more than rounding.

    forward: called in the model's place. Within a call of the model it has to be what lies below its wrappers:
    accelerate's enters one autocast object, which entered twice never leaves.
    """
    kind, modes = type(model).__name__, [(module, module.training) for module in model.modules()]
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = [(7 * i + 3) % vocabulary for i in range(40)]
    groups = [(ids[:4], (ids[13:17], ids[17:23])), (ids[1:13], (ids[23:29], ids[29:31]))]
    model.eval()
    try:
        with torch.autocast(next(model.parameters()).device.type, enabled=False):  # ROUNDING is that of the weights
            apart = relative_difference(model, forward or model, groups)
    except Exception as error:  # how a family that knows no such cache fails is its own matter
        return f"{kind} cannot go on from the cache of a prompt ({type(error).__name__}: {str(error)[:80]})"
    finally:
        for module, training in modes:
            module.training = training
    if not apart <= ROUNDING.get(next(model.parameters()).dtype, ROUNDED):
        return f"{kind} computes other numbers from the cache of a prompt (logits differ by {apart:.0e})"
    return None


def relative_difference(model: Any, forward: Callable[..., Any], groups: Sequence[tuple[Ids, Sequence[Ids]]]) -> float:
    """Of the logits around their mean, between shared prompts and rows that stand alone without padding."""
    device = next(model.parameters()).device
    inputs, _ = layout(groups, pad_id=0)
    call: dict[str, Any] = {name.removeprefix("gft_"): value.to(device) for name, value in inputs.items()}
    prompt_ids, prompt_of = (call.pop(name) for name in ARGUMENTS)
    if hasattr(model.config, "output_router_logits"):  # its loss, which logits do not need, counts whole rows' tokens
        call["output_router_logits"] = False
    shared = forward(**behind_prompts(model, call, prompt_ids, prompt_of), return_dict=True).logits
    pairs = [(prompt, response) for prompt, responses in groups for response in responses]
    worst = 0.0
    for mine, (prompt, response) in zip(shared, pairs, strict=True):
        row = torch.tensor([[*prompt, *response[:-1]]], device=device)
        whole = forward(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False, return_dict=True)
        theirs = whole.logits[0, len(prompt) - 1 :]
        mine, theirs = (logits.double() - logits.double().mean(-1, True) for logits in (mine[: len(response)], theirs))
        worst = max(worst, float((mine - theirs).norm() / theirs.norm()))
    return worst
