"""OpenRLHF where it has no GPU: its modules import flash-attn and vLLM, which a CPU cannot have and no test here calls.

`host()` says whether the real package is there. Where it is not, `stand_in` puts a module of ours in the place of
`openrlhf.models.loss`, with the one function that the adapter calls: `aggregate_loss(loss, loss_mask,
token_level_loss=True, dp_size=1, batch_num_tokens=None, global_batch_size=None)`, as OpenRLHF 0.11.2 defines it.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types

_NEED_A_GPU = {
    "flash_attn": ("flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed"),
    "vllm": ("vllm.inputs", "vllm.utils"),
}


class Absent(types.ModuleType):
    """A package whose every name can be imported and none can be used."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__spec__, self.__path__ = importlib.machinery.ModuleSpec(name, None), []

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def host() -> bool:
    """Whether OpenRLHF is installed; if so it can be imported afterwards."""
    if importlib.util.find_spec("openrlhf") is None:
        return False
    for package, modules in _NEED_A_GPU.items():
        if importlib.util.find_spec(package) is None:
            sys.modules.update({name: Absent(name) for name in (package, *modules)})
    return True


def stand_in(monkeypatch) -> None:
    loss = types.ModuleType("openrlhf.models.loss")
    loss.aggregate_loss = aggregate_loss
    for name, module in (("openrlhf", Absent("openrlhf")), ("openrlhf.models", Absent("openrlhf.models"))):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "openrlhf.models.loss", loss)


def aggregate_loss(loss, loss_mask, token_level_loss=True, dp_size=1, batch_num_tokens=None, global_batch_size=None):
    """Sum over tokens by the tokens of the step, or over responses of their means by the responses of the step."""
    if token_level_loss:
        return (loss * loss_mask).sum() / batch_num_tokens * dp_size
    per_response = (loss * loss_mask).sum(-1) / (loss_mask.sum(-1) + 1e-8)
    return per_response.sum() / global_batch_size * dp_size
