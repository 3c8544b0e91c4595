"""The forward of a patched model: with labels, the loss from inside the output head; without, what it was before."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from gft_kernels import checks
from gft_kernels.api import policy_loss
from gft_kernels.model import output_head
from gft_kernels.model.columns import PER_CALL, aligned_columns
from gft_kernels.model.output_head import HeadCall, Transform
from gft_kernels.options import TokenStats

PREFIX = "gft_"
OF_THE_MODEL = ("weight", "bias", "logit_scale", "softcap", "process_group", "inplace")
_LINEAR_ONLY = ("chunk_rows", "accum_dtype", "logits_dtype")
_COLUMNS = tuple(name for name in PER_CALL if name != "num_items_in_batch")
_REPLACED = ("forward", "accepts_loss_kwargs")


class PatchedForward:
    """Stands in for the forward of one model; copied and pickled with it."""

    def __init__(self, model: Any, head: str | None, options: dict[str, Any]):
        self.model, self.head, self.options = model, head, options
        self.replaced = {name: model.__dict__.get(name) for name in _REPLACED}
        self.transforms = output_head.transforms(model.config)
        self.transform: Transform | None = None  # the one of them that the model is known to apply
        self.refusal: str | None = None  # why the logits are needed, where no later call can change that
        self.warned: set[str] = set()
        self.__name__, self.__doc__ = "forward", model.forward.__doc__
        self.__signature__ = signature(model.forward)
        parameters = self.__signature__.parameters.values()
        self.names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters) and hasattr(model.config, "use_cache")
        self.takes_use_cache = "use_cache" in self.names or passes_on

    def __call__(self, *args, **kwargs):
        if args and args[0] is self.model:  # accelerate binds what it unwraps to the model, as if it were a function
            args = args[1:]
        kwargs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if self.model.__dict__.get("_gft_forward") is not self:  # unpatched, but another library holds on to this
            return self.plain(kwargs)
        named = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith(PREFIX)}
        named = {name.removeprefix(PREFIX): value for name, value in named.items() if value is not None}
        if kwargs.get("labels") is not None or kwargs.get("shift_labels") is not None:
            return self.with_loss(kwargs, self.call_options(named))
        if named:
            raise ValueError(f"labels must be given with {PREFIX}{next(iter(named))}, got None; pass labels=")
        return self.plain(kwargs)

    def plain(self, kwargs: dict[str, Any]):
        """The forward the model had before."""
        before = self.replaced["forward"]
        return type(self.model).forward(self.model, **kwargs) if before is None else before(**kwargs)

    def call_options(self, named: dict[str, Any]) -> dict[str, Any]:
        """The options of every call and those of this one."""
        checks.known_options(policy_loss, named)
        refuse(named, OF_THE_MODEL, PREFIX, "be left to the model, got a value; leave it out")
        refuse(named, ("num_items_in_batch",), PREFIX, "be left out, got a value; pass num_items_in_batch=")
        return {**self.options, **named}

    def output_head(self) -> nn.Module:
        """The head as it is now: since the last call adapters may have come, or FSDP2 may have wrapped it."""
        if self.head is not None:
            return self.model.get_submodule(self.head)
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        if not isinstance(head, nn.Module):
            raise ValueError(
                f"model must have an output head, got {type(self.model).__name__} without one; name it by head="
            )
        return head

    def with_loss(self, kwargs: dict[str, Any], options: dict[str, Any]):
        """The model's own output with the loss in it, and no logits."""
        labels, shift_labels = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        options["num_items_in_batch"] = kwargs.pop("num_items_in_batch", None)
        columns = functools.partial(aligned_columns, labels, shift_labels, options, kwargs.get("logits_to_keep", 0))
        as_dict = kwargs.pop("return_dict", None)
        if as_dict is None:
            as_dict = getattr(self.model.config, "return_dict", True)
        kwargs["return_dict"] = True
        if self.takes_use_cache:
            kwargs.setdefault("use_cache", False)  # nothing is generated from a batch with labels
        try:
            output, result = self.in_head(kwargs, columns)
        except LogitsNeededError as reason:
            self.warn(str(reason))
            output, result = self.from_logits(kwargs, columns)
        output = self.finished(output, *(result if isinstance(result, tuple) else (result, None)))
        return output if as_dict else output.to_tuple()

    def in_head(self, kwargs: dict[str, Any], columns: Callable):
        """The model's output, and the loss (or loss and statistics) its head has computed. Raises LogitsNeededError."""
        head = output_head.trained_module(self.output_head())
        reason = self.refusal or output_head.adapted(head)
        if reason is not None:
            raise LogitsNeededError(reason)
        if self.transform is None:
            guess = self.transforms[0]
            output, call = self.attempt(head, guess, kwargs, columns, check=True)
            self.transform = call.explanation(self.transforms, output.logits)
            if self.transform == guess:
                return output, call.result()
        if self.transform is not None:
            output, call = self.attempt(head, self.transform, kwargs, columns, check=False)
        if call.refusal is not None:
            self.refusal = call.refusal
            raise LogitsNeededError(call.refusal)
        return output, call.result()

    def attempt(self, head: Any, transform: Transform, kwargs, columns: Callable, check: bool):
        def loss_of(hidden_STD: Tensor):
            hidden, targets, options = columns(hidden_STD)
            return policy_loss(
                hidden,
                targets,
                weight=head.weight,
                bias=head.bias,
                logit_scale=transform.logit_scale,
                softcap=transform.softcap,
                **options,
            )

        with HeadCall(head, loss_of, check) as call:
            output = self.plain(kwargs)
        return output, call

    def from_logits(self, kwargs: dict[str, Any], columns: Callable):
        """The model's output, and the loss of its logits; options about the head's product have nothing to say here."""
        output = self.plain(kwargs)
        logits, targets, options = columns(output.logits)
        return output, policy_loss(logits, targets, **{k: v for k, v in options.items() if k not in _LINEAR_ONLY})

    def finished(self, output, loss: Tensor, stats: TokenStats | None):
        """The output's own class with the loss, and the router's with it where the model returned that."""
        if output.get("aux_loss") is not None:
            loss = loss + self.router_weight() * output.aux_loss.to(loss.device)
        fields = {name: value for name, value in output.items() if name not in ("loss", "logits")}
        if stats is None:
            return type(output)(loss=loss, **fields)
        return with_stats(output.__class__)(loss=loss, stats=stats, **fields)

    def router_weight(self) -> float:
        """What the model would multiply its load-balancing loss by before adding it to the loss of its labels."""
        for owner in (self.model, self.model.config.get_text_config(decoder=True)):
            for name in ("router_aux_loss_coef", "aux_loss_coef"):
                if hasattr(owner, name):
                    return float(getattr(owner, name))
        raise ValueError(
            f"output_router_logits must be False for {type(self.model).__name__}, got a router loss without a weight "
            "in its config; add the loss yourself"
        )

    def warn(self, reason: str) -> None:
        if reason not in self.warned:
            self.warned.add(reason)
            warnings.warn(
                f"the GFT loss of {type(self.model).__name__} is computed from all of its logits, which takes more "
                f"memory: {reason}",
                stacklevel=2,
            )


class LogitsNeededError(Exception):
    """The loss cannot be computed inside the head; the message is the reason."""


@functools.cache
def with_stats(output_class: Any) -> Any:
    """A model's output class with room for TokenStats, `stats`, next to the loss."""
    return dataclasses.make_dataclass(
        f"{output_class.__name__}WithStats",
        [("stats", TokenStats | None, None)],
        bases=(output_class,),
        namespace={"__module__": __name__},
    )


def signature(forward: Callable) -> inspect.Signature:
    """The forward's own parameters (generate and Trainer read them) and the tensors a batch may bring for the loss."""
    own = list(inspect.signature(forward).parameters.values())
    rest = [own.pop()] if own and own[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    # Without annotations: those of some models cannot be copied or pickled.
    added = [inspect.Parameter(PREFIX + name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in _COLUMNS]
    return inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in (*own, *added, *rest)])


def refuse(given: Iterable[str], names: Iterable[str], prefix: str, remedy: str) -> None:
    for name in given:
        if name in names:
            raise TypeError(f"{prefix}{name} must {remedy}")
