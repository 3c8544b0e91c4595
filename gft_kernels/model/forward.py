"""The forward of a patched model: with labels, the loss from inside the output head; without, what it was before."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from gft_kernels.api import policy_loss
from gft_kernels.arguments import completed
from gft_kernels.model import head as heads
from gft_kernels.model import shared_prompts
from gft_kernels.model.columns import PER_CALL, Columns
from gft_kernels.model.extra_terms import extra_terms
from gft_kernels.model.guard import OWN_LOSS, PREFIX, Guard, brought
from gft_kernels.model.head import HeadCall, Transform
from gft_kernels.options import TokenStats

OF_THE_MODEL = ("weight", "bias", "logit_scale", "softcap", "process_group", "inplace")
_LINEAR_ONLY = ("chunk_rows", "accum_dtype", "logits_dtype", "filter_eps")
_COLUMNS = tuple(name for name in PER_CALL if name != "num_items_in_batch")
_REPLACED = ("forward", "accepts_loss_kwargs")


class PatchedForward:
    """Stands in for the forward of one model; copied and pickled with it."""

    def __init__(self, model: Any, head: str | None, options: dict[str, Any], eval_logits: bool):
        self.model, self.head, self.options, self.eval_logits = model, head, options, eval_logits
        self.replaced = {name: model.__dict__.get(name) for name in _REPLACED}
        self.found_for: tuple | None = None  # the head and the numbers that the next two hold for
        self.transform: Transform | None = None  # what the model is known to do to its logits
        self.refusal: str | None = None  # why the logits are needed
        self.warned: set[str] = set()
        self.tried_prompts = False  # whether it may go on from the cache of a prompt
        self.head_call: HeadCall | None = None  # the one under way
        self.__name__, self.__doc__ = "forward", model.forward.__doc__
        self.__signature__ = signature(model.forward)
        parameters = self.__signature__.parameters.values()
        self.names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters) and hasattr(model.config, "use_cache")
        self.takes_use_cache = "use_cache" in self.names or passes_on
        self.output_head()  # raises if there is none
        self.guard = Guard(model, self)

    def __call__(self, *args, **kwargs):
        if args and args[0] is self.model:  # accelerate binds what it unwraps to the model, as if it were a function
            args = args[1:]
        if len(args) > len(self.names):
            raise TypeError(
                f"{type(self.model).__name__} must be given at most {len(self.names)} arguments by position, "
                f"got {len(args)}; name them"
            )
        kwargs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if self.model.__dict__.get("_gft_forward") is not self:  # unpatched, but another library holds on to this
            return self.plain(kwargs)
        self.guard.running += 1
        try:
            with contextlib.nullcontext() if self.head_call is None else self.head_call.set_aside():
                return self.answer(kwargs)
        finally:
            self.guard.running -= 1

    def answer(self, kwargs: dict[str, Any]):
        """With labels, the model's output with the loss in it; without, what it was before."""
        given = brought(kwargs)
        named = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith(PREFIX)}
        named = {name.removeprefix(PREFIX): value for name, value in named.items() if value is not None}
        if kwargs.get("labels") is not None or kwargs.get("shift_labels") is not None:
            prompts = shared_prompts.taken(named)
            options = self.call_options(named)
            self.guard.taken(given)
            return self.with_loss(kwargs, options, prompts)
        if named:
            name = PREFIX + next(iter(named))
            raise ValueError(f"labels must be given with {name}, got None; pass labels= to the model, and {OWN_LOSS}")
        output = self.plain(kwargs)
        self.guard.refuse_unlabelled(output)
        return output

    def plain(self, kwargs: dict[str, Any]):
        """The forward the model had before."""
        before = self.replaced["forward"]
        return type(self.model).forward(self.model, **kwargs) if before is None else before(**kwargs)

    def call_options(self, named: dict[str, Any]) -> dict[str, Any]:
        """The options of every call and those of this one."""
        completed(policy_loss, named)  # refuses a name that it does not know
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

    def with_loss(self, kwargs: dict[str, Any], options: dict[str, Any], prompts: tuple[Tensor, Tensor] | None):
        """The model's own output with the loss in it, and no logits."""
        labels, shift_labels = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        options["num_items_in_batch"] = kwargs.pop("num_items_in_batch", None)
        columns = Columns(labels, shift_labels, options, kwargs.get("logits_to_keep", 0))
        as_dict = kwargs.pop("return_dict", None)
        if as_dict is None:
            as_dict = getattr(self.model.config, "return_dict", True)
        kwargs["return_dict"] = True
        keeps_logits = self.eval_logits and not self.model.training
        dropped = {"loss"} if keeps_logits else {"loss", "logits"}
        if prompts is not None:
            shared_prompts.refuse(self.model, self.tried_prompts, lambda **kwargs: self.plain(kwargs))
            self.tried_prompts = True
            kwargs = shared_prompts.behind_prompts(self.model, kwargs, *prompts)
            dropped.add(shared_prompts.cache_name(self.model))  # the prompts', which nobody can go on from
        elif self.takes_use_cache:
            kwargs.setdefault("use_cache", False)  # nothing is generated from a batch with labels
        try:
            output, result = (self.from_logits if keeps_logits else self.in_head)(kwargs, columns)
        except LogitsNeededError as reason:
            self.warn(str(reason))
            output, result = self.from_logits(kwargs, columns)
        loss, stats = result if isinstance(result, tuple) else (result, None)
        terms = extra_terms(self.model, output)
        if terms is not None:
            loss = loss + columns.share() * terms.to(loss.device)
        output = finished(output, loss, stats, dropped)
        return output if as_dict else output.to_tuple()

    def in_head(self, kwargs: dict[str, Any], columns: Columns):
        """The model's output, and the loss (or loss and statistics) its head has computed. Raises LogitsNeededError."""
        outer = self.output_head()
        head, transforms = heads.trained_module(outer), heads.transforms(self.model)
        now = outer, type(head), transforms
        if now != self.found_for:
            self.found_for, self.transform, self.refusal = now, None, None
        reason = self.refusal or heads.adapted(head) or heads.hooked(outer, head)
        if reason is not None:
            raise LogitsNeededError(reason)
        if self.transform is None:
            guess = transforms[0]
            output, call = self.attempt(head, guess, kwargs, columns, check=True)
            transform = call.explanation(transforms, output.logits)
            if not call.clears(extra_terms(self.model, output)):
                return self.from_logits(kwargs, columns)  # until a call with gradients tells
            if call.refusal is None:
                self.transform = transform
            if self.transform == guess:
                return output, call.result()
        if self.transform is not None:
            output, call = self.attempt(head, self.transform, kwargs, columns, check=False)
        if call.refusal is not None:
            self.refusal = call.refusal
            raise LogitsNeededError(call.refusal)
        return output, call.result()

    def attempt(self, head: Any, transform: Transform, kwargs, columns: Columns, check: bool):
        def loss_of(hidden_STD: Tensor):
            hidden, targets, options = columns.beside(hidden_STD)
            return policy_loss(
                hidden,
                targets,
                weight=head.weight,
                bias=head.bias,
                logit_scale=transform.logit_scale,
                softcap=transform.softcap,
                **options,
            )

        if check:
            kwargs = shared_prompts.with_copied_cache(self.model, kwargs)
        with HeadCall(head, loss_of, check) as call:
            around, self.head_call = self.head_call, call
            try:
                output = self.plain(kwargs)
            finally:
                self.head_call = around
        return output, call

    def from_logits(self, kwargs: dict[str, Any], columns: Columns):
        """The model's output, and the loss of its logits; options about the head's product have nothing to say here."""
        output = self.plain(kwargs)
        logits, targets, options = columns.beside(output.logits)
        return output, policy_loss(logits, targets, **{k: v for k, v in options.items() if k not in _LINEAR_ONLY})

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


def finished(output: Any, loss: Tensor, stats: TokenStats | None, dropped: set[str]) -> Any:
    """The output's own class with the loss, without the fields that are dropped."""
    fields = {name: value for name, value in output.items() if name not in dropped}
    if stats is None:
        return type(output)(loss=loss, **fields)
    return with_stats(output.__class__)(loss=loss, stats=stats, **fields)


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
    names = (*_COLUMNS, *shared_prompts.ARGUMENTS)
    added = [inspect.Parameter(PREFIX + name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    return inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in (*own, *added, *rest)])


def refuse(given: Iterable[str], names: Iterable[str], prefix: str, remedy: str) -> None:
    for name in given:
        if name in names:
            raise TypeError(f"{prefix}{name} must {remedy}")
