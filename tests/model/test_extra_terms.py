"""A loss term a model returns beside its logits is a share of the step's loss, whichever way the step is cut."""

from __future__ import annotations

import copy

import pytest
import torch
from test_hf import ADVANTAGES_S, assert_same, batch, gradients, model_inputs, packed
from test_hf_trainer import CUTS, WINDOW, rows, trained, windows
from tiny_families import tiny
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from gft_kernels import gft_loss
from gft_kernels.model.patch import patch_model


class MeanTerm(LlamaForCausalLM):
    """Its term is a plain mean over positions, so weighed means of micro-batches are the mean of the step."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        output = super().forward(input_ids, labels=labels, **kwargs)
        term = output.logits.float().logsumexp(-1).square().mean()
        return MoeCausalLMOutputWithPast(logits=output.logits, aux_loss=term)


class OwnTerm(LlamaForCausalLM):
    """One that weighs its term itself and returns it as its loss."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.loss = 0.7 * self.lm_head.weight.square().mean()
        return output


def with_mean_term():
    model = tiny("llama")
    model.__class__, model.config.router_aux_loss_coef = MeanTerm, 0.9
    return model


def routed(family):
    model = tiny(family)
    model.config.output_router_logits, model.router_aux_loss_coef = True, 1.0
    return model


MODELS = {
    "a mean over positions": with_mean_term,
    "mixtral": lambda: routed("mixtral"),
    "qwen2_moe": lambda: routed("qwen2_moe"),
}


def even_rows() -> list[dict]:
    """Rows of as many tokens each: then shares of tokens are shares of positions."""
    found = rows()
    for row in found:
        row["labels"] = torch.where(torch.arange(9) < 3, -100, row["input_ids"])
    return found


def with_terms(model, micro_batch: int) -> list[tuple[float, dict]]:
    """Loss and gradients of each window: the whole window's loss, and its micro-batches' terms by their tokens."""
    weight = getattr(model, "router_aux_loss_coef", None) or model.config.router_aux_loss_coef

    def terms(ids: torch.Tensor) -> torch.Tensor:
        cuts = ids.split(micro_batch)
        return sum(len(cut) / len(ids) * weight * model(input_ids=cut).aux_loss for cut in cuts)

    return windows(model, even_rows(), terms)


@pytest.mark.filterwarnings("ignore:the GFT loss")  # MeanTerm reads the logits
@pytest.mark.parametrize(
    ("name", "micro_batch", "accumulation"),
    [(name, *cut) for name in MODELS for cut in (CUTS[1::2] if name == "qwen2_moe" else CUTS)],
)
def test_a_step_adds_its_micro_batches_terms_by_their_tokens(name, micro_batch, accumulation, tmp_path):
    """Exactly; so a mean does not depend on the cut, and a product of two means, as a router's is, does a little."""
    expected, whole = with_terms(MODELS[name](), micro_batch), with_terms(MODELS[name](), WINDOW)
    found = trained(MODELS[name](), even_rows(), tmp_path, micro_batch, accumulation)
    assert len(found) == 2
    for ours, theirs, of_the_whole in zip(found, expected, whole, strict=True):
        assert_same(ours, theirs, tolerance=1e-4)
        if name == "a mean over positions":
            assert_same(ours, of_the_whole, tolerance=1e-4)
        assert ours[0] == pytest.approx(of_the_whole[0], abs=0.25)  # a term too many is 1 more, 7 in the smallest cut


def call(model, inputs, **options):
    return model(**inputs, gft_advantages=ADVANTAGES_S, **options).loss


SHARES = {
    "token-mean": lambda live, items: 1.0 if items is None else live / items,
    "sequence-mean": lambda live, items: 1.0,  # of responses seen, where they are counted
    "sum": lambda live, items: live,
}


@pytest.mark.parametrize("rows_are", ["padded", "packed"])
@pytest.mark.parametrize("items", [None, 57])
@pytest.mark.parametrize("reduction", SHARES)
def test_a_term_is_divided_as_the_losses_of_the_tokens_are(reduction, items, rows_are):
    if reduction == "sum" and items is not None:
        pytest.skip("a sum is not divided")
    inputs = batch("right") if rows_are == "padded" else packed()
    model = patch_model(tiny("llama"), reduction=reduction)
    term = 0.7 * model.lm_head.weight.square().mean()
    half = torch.arange(inputs["labels"].shape[1]) >= inputs["labels"].shape[1] // 2
    for mask in (None, half.expand_as(inputs["labels"])):
        options = {"num_items_in_batch": items, **({} if mask is None else {"gft_mask": mask})}
        model.__class__ = LlamaForCausalLM
        alone = call(model, inputs, **options)
        model.__class__ = OwnTerm
        live = (inputs["labels"][:, 1:] != -100) & (True if mask is None else mask[:, 1:])
        share = SHARES[reduction](int(live.sum()), items)
        if reduction == "sequence-mean" and items is not None:
            seen = live.any(1).sum() if rows_are == "padded" else len(inputs["gft_sequence_ids"][:, 1:][live].unique())
            share = int(seen) / items
        assert call(model, inputs, **options).item() == pytest.approx((alone + share * term).item(), rel=1e-5)


def test_every_token_carries_it_where_nothing_is_reduced():
    model, inputs = patch_model(tiny("llama"), reduction="none"), batch("right")
    alone = call(model, inputs)
    model.__class__ = OwnTerm
    live = torch.nn.functional.pad(inputs["labels"][:, 1:] != -100, (0, 1))
    torch.testing.assert_close(call(model, inputs) - alone, 0.7 * model.lm_head.weight.square().mean() * live)


@pytest.mark.parametrize("items", [None, 40])
def test_a_batch_that_stands_in_for_an_empty_one_adds_none(items):
    model, inputs = patch_model(routed("mixtral")), batch("right")
    inputs["labels"].fill_(-100)
    loss = call(model, inputs, num_items_in_batch=items)
    loss.backward()
    assert loss == 0.0 and all(not gradient.any() for gradient in gradients(model).values())


def test_a_term_without_a_weight_is_an_error():
    model = patch_model(copy.deepcopy(with_mean_term()))
    del model.config.router_aux_loss_coef
    with pytest.raises(ValueError, match="aux_loss must have a weight in the config of MeanTerm, got none"):
        call(model, batch("right"))


def test_a_term_that_is_only_added_to_a_loss_of_labels_is_an_error():
    """As bamba does, which returns nothing of it."""
    model = patch_model(tiny("llama"))
    model.z_loss_coefficient = 0.0
    assert call(model, batch("right")).isfinite()
    model.z_loss_coefficient = 0.1
    with pytest.raises(ValueError, match=r"^z_loss_coefficient of Llama.* must be 0, got 0.1; set it to 0"):
        call(model, batch("right"))


@pytest.mark.parametrize("gradients_first", [True, False])
def test_a_term_of_the_logits_is_computed_from_logits(gradients_first):
    """Those in the place of logits are none; a first call without gradients cannot tell and takes them as well."""
    model, inputs = with_mean_term(), batch("right")
    plain = model(**model_inputs(inputs))
    loss = gft_loss(plain.logits[:, :-1], inputs["labels"][:, 1:], advantages=ADVANTAGES_S)
    expected = (loss + 0.9 * plain.aux_loss).item()
    patch_model(model)
    if not gradients_first:
        with torch.no_grad():
            assert call(model, inputs).item() == pytest.approx(expected, rel=1e-4)
    with pytest.warns(UserWarning, match="a term that the model adds to its loss is computed from them"):
        assert call(model, inputs).item() == pytest.approx(expected, rel=1e-4)
    assert call(model, inputs).item() == pytest.approx(expected, rel=1e-4)
