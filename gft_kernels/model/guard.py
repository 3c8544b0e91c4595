"""The guard of a patched model: what a call brings for the loss reaches the loss, whoever replaces what.

A library that assigns `model.forward` after the patch, or reads labels off the batch for a loss of its own, would
train something else and look well doing it. So hooks note what each call of the model brings, the patched forward
strikes out what it is given, and what is left over when the call returns is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from gft_kernels.model.head import origin

PREFIX = "gft_"
LABELS = ("labels", "shift_labels")
OWN_LOSS = (
    "switch off what makes the trainer compute a loss of its own from the logits (label smoothing, "
    "compute_loss_func, loss_type and the like)"
)


def brought(kwargs: dict[str, Any]) -> set[str]:
    """The names of a call's arguments that are for the loss."""
    return {name for name, value in kwargs.items() if value is not None and (name in LABELS or name.startswith(PREFIX))}


class Guard:
    """Watches the calls of one patched model; copied and pickled with it."""

    def __init__(self, model: Any, forward: Any):
        self.model, self.forward = model, forward
        self.open: list[set[str]] = []  # of each call under way, what it brought that the loss has not been given
        self.running = 0  # calls of the patched forward under way
        self.handles: list[Any] = []
        self.watch(model)
        trunk = getattr(model, "base_model", None)
        inside = trunk if isinstance(trunk, nn.Module) and trunk is not model else forward.output_head()
        self.handles.append(inside.register_forward_pre_hook(self.passing))

    def watch(self, module: nn.Module) -> None:
        """Hold the calls of the model, or of a wrapper around it, against what reaches the loss."""
        self.handles.append(module.register_forward_pre_hook(self.opening, with_kwargs=True, prepend=True))
        # Called when a forward raises as well, or else a call that failed would stay open.
        self.handles.append(module.register_forward_hook(self.closing, with_kwargs=True, always_call=True))

    def require(self, module: nn.Module, check: Callable) -> None:
        """Let `check(module, args, kwargs)` look at, and mend, what each call of `module` brings."""
        self.handles.append(module.register_forward_pre_hook(check, with_kwargs=True))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def opening(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        named = dict(zip(self.forward.names, args, strict=False)) if module is self.model else {}
        self.open.append(brought({**named, **kwargs}))

    def taken(self, names: Iterable[str]) -> None:
        """The loss has been given these; asked of every call under way, for a wrapper's call holds the model's."""
        for call in self.open:
            call.difference_update(names)

    def closing(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        lost = self.open.pop() if self.open else set()
        if lost and output is not None:  # None: the forward has raised
            raise ValueError(f"{', '.join(sorted(lost))} must reach the patched forward of {self.told()}")

    def passing(self, inside: nn.Module, args: tuple) -> None:
        """Who calls the class's forward (PEFT's wrappers do), or trunk and head by hand, passes every hook but theirs.

        A part that backward runs again was called before; without gradients, nothing is trained.
        """
        if self.running or not self.model.training or not torch.is_grad_enabled():
            return
        in_backward = torch._C._current_graph_task_id() != -1
        if not in_backward and any(p.requires_grad for p in self.model.parameters()):
            raise ValueError(f"a training call must reach the patched forward of {self.told()}")

    def told(self) -> str:
        """The rest of the sentence: whose forward the call went through instead, and what to do."""
        now = self.model.__dict__.get("forward")
        past = f"{type(self.model).__name__}, got a call that went past it"
        if now is self.forward:
            return f"{past}; call the model itself, not its class's forward or its parts, or call unpatch_model"
        return (
            f"{past}, but through {origin(now)}; call patch_model last, or switch off the library's own loss "
            "(use_liger_kernel: liger_kernel_config={'fused_linear_cross_entropy': False})"
        )

    def refuse_unlabelled(self, output: Any) -> None:
        """Raises ValueError where logits without labels are about to be trained on by somebody else's loss."""
        first = output[0]
        if self.model.training and isinstance(first, torch.Tensor) and first.requires_grad:
            raise ValueError(
                f"labels must come with every training call of a patched {type(self.model).__name__}, got none; "
                f"{OWN_LOSS}, or call unpatch_model"
            )
