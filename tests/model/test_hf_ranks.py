"""Patched models on two ranks (gloo): DDP and FSDP2 reduce the gradients to those of one process on the joined batch.

One pair of processes runs every check and writes its gradients; the tests read them.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import start_ranks
from test_hf import S, batch, gradients
from tiny_families import tiny
from torch.nn.parallel import DistributedDataParallel

from gft_kernels import gft_loss
from gft_kernels.model.patch import patch_model
from gft_kernels.model.shared_prompts import layout

WORLD = 2
ADVANTAGES = torch.linspace(-0.8, 1.9, WORLD * S)


def joined(silent_rank: bool) -> dict:
    """Every rank's rows; with a silent rank, the last rank's have no label."""
    parts = [batch("right", seed=7 + rank) for rank in range(WORLD)]
    for part in parts:
        part["input_ids"][1, :2] = part["input_ids"][0, :2]  # two responses to one prompt
    if silent_rank:
        parts[-1]["labels"].fill_(-100)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} | {"gft_advantages": ADVANTAGES}


def live_tokens(inputs: dict) -> int:
    return int((inputs["labels"][:, 1:] != -100).sum())


def one_process(family: str, silent_rank: bool) -> dict[str, torch.Tensor]:
    """Gradients from the logits of the joined batch, without a patch."""
    model, inputs = made(family), joined(silent_rank)
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    loss = gft_loss(model(**texts).logits[:, :-1], inputs["labels"][:, 1:], advantages=ADVANTAGES)
    if family == "mixtral":  # each rank's term by its share of the tokens
        for rank in range(WORLD):
            part = {name: value[rank * S : (rank + 1) * S] for name, value in inputs.items()}
            term = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"]).aux_loss
            loss = loss + live_tokens(part) / live_tokens(inputs) * term
    loss.backward()
    return gradients(model)


def made(family: str):
    model = tiny(family)
    if family == "mixtral":
        model.config.output_router_logits, model.router_aux_loss_coef = True, 1.0
    return model


def with_shared_prompts(rows: dict) -> dict:
    """A rank's rows with each prompt once."""
    texts = [ids[mask.bool()].tolist() for ids, mask in zip(rows["input_ids"], rows["attention_mask"], strict=True)]
    first, *rest = texts
    groups = [(first[:2], [first[2:], rest.pop(0)[2:]]), *((text[:2], [text[2:]]) for text in rest)]
    inputs, targets = layout(groups, pad_id=0)
    return {**inputs, "shift_labels": targets, "gft_advantages": rows["gft_advantages"]}


def backward(model, rank: int, silent_rank: bool = False, micro_batches: int = 1, shares: bool = False) -> None:
    """This rank's rows, cut into micro-batches; the denominator counts all rows of all ranks."""
    inputs = joined(silent_rank)
    items = live_tokens(inputs)
    rows = torch.arange(rank * S, (rank + 1) * S).chunk(micro_batches)
    for i, part in enumerate(rows):
        with contextlib.nullcontext() if i == len(rows) - 1 else model.no_sync():
            some = {name: value[part] for name, value in inputs.items()}
            output = model(**(with_shared_prompts(some) if shares else some), num_items_in_batch=items)
            (output.loss * WORLD).backward()  # both wrappers average over the ranks


def ddp(rank: int, family: str = "gemma2", patch_first: bool = True, **options) -> dict[str, torch.Tensor]:
    model = made(family)
    if patch_first:
        wrapped = DistributedDataParallel(patch_model(model), find_unused_parameters=True)
    else:
        wrapped = patch_model(DistributedDataParallel(model))
    backward(wrapped, rank, **options)
    found = gradients(model)
    assert refused(wrapped, model)
    return found


def refused(wrapped, model) -> bool:
    """Whether a forward assigned after the patch is noticed through the wrapper."""
    model.forward = lambda **kwargs: [torch.zeros((), requires_grad=True)]
    try:
        wrapped(**joined(False))
    except ValueError as error:
        return "must reach the patched forward" in str(error)
    return False


def fsdp2(rank: int, groups, family: str = "llama", silent_rank: bool = False) -> dict[str, torch.Tensor]:
    """Each layer a group, those named, and the rest in the root's; two steps, for the first one checks the model."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    model = patch_model(tiny(family))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    for group in groups:
        fully_shard([model.get_submodule(name) for name in group], mesh=mesh)
    fully_shard(model, mesh=mesh)
    for _ in range(2):
        model.zero_grad()
        backward(model, rank, silent_rank)
    assert model.forward.refusal is None and model.forward.transform is not None
    found = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"gft_prompt_ids must be left out, .* lie in parts"):
        backward(model, rank, shares=True)
    assert refused(model, model)
    return found


CHECKS = {
    # name: (what a rank runs, the family, whether the last rank has no label)
    "ddp": (ddp, "gemma2", False),
    "ddp, patched through the wrapper": (functools.partial(ddp, patch_first=False), "gemma2", False),
    "ddp, one rank without a live token": (functools.partial(ddp, silent_rank=True), "gemma2", True),
    "ddp, a router's loss": (functools.partial(ddp, family="mixtral"), "mixtral", False),
    "ddp, a router's loss, one rank without a live token": (
        functools.partial(ddp, family="mixtral", silent_rank=True), "mixtral", True),
    "ddp, 2 micro-batches": (functools.partial(ddp, micro_batches=2), "gemma2", False),
    "ddp, 4 micro-batches": (functools.partial(ddp, micro_batches=4), "gemma2", False),
    "ddp, each prompt once": (functools.partial(ddp, family="qwen2", shares=True), "qwen2", False),
    "fsdp2, head in the root": (functools.partial(fsdp2, groups=[]), "llama", False),
    "fsdp2, head in its own group": (functools.partial(fsdp2, groups=[["lm_head"]]), "llama", False),
    "fsdp2, head with the norm": (functools.partial(fsdp2, groups=[["model.norm", "lm_head"]]), "llama", False),
    "fsdp2, tied head": (functools.partial(fsdp2, groups=[], family="llama-tied"), "llama-tied", False),
    "fsdp2, one rank without a live token": (
        functools.partial(fsdp2, groups=[["lm_head"]], silent_rank=True), "llama", True),
}  # fmt: skip


def run_rank(rank: int, folder: Path) -> dict:
    warnings.filterwarnings("error", message="the GFT loss")
    dist.init_process_group("gloo")
    return {name: check(rank) for name, (check, *_) in CHECKS.items()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    return start_ranks(run_rank, tmp_path_factory.mktemp("ranks"), WORLD)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_two_ranks_have_the_gradients_of_one_process(ranks, check):
    _, family, silent_rank = CHECKS[check]
    first, second = (found[check] for found in ranks)
    expected = one_process(family, silent_rank)
    assert first.keys() == second.keys() == expected.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    assert largest > 5e-3
    for name, gradient in expected.items():
        assert torch.equal(first[name], second[name]), name
        assert (first[name] - gradient).norm() <= 2e-5 * (gradient.norm() + 0.05 * largest), name
