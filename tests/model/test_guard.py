"""What is brought for the loss reaches it, or the call says in one sentence that it did not, whoever replaced what."""

from __future__ import annotations

import copy
import functools
import pickle
import types

import pytest
import torch
from test_hf import ADVANTAGES_S, UPSTREAM, assert_same, batch, gradients, model_inputs, patched, unfused
from tiny_families import tiny
from transformers import Trainer, TrainingArguments

from gft_kernels.model.patch import patch_model, unpatch_model

pytestmark = pytest.mark.filterwarnings("error:the GFT loss")


def another_forward(model):
    """As Liger's and others' do: a forward with a loss of its own, around the trunk."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, num_items_in_batch=None, **ignored):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.lm_head(hidden)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return types.SimpleNamespace(loss=loss, logits=logits) if labels is None else [loss, logits]

    model.forward = types.MethodType(forward, model)


def liger(model):
    pytest.importorskip("liger_kernel", reason="liger_kernel is not installed")
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    off = dict.fromkeys(("rope", "rms_norm", "swiglu"), False)  # those kernels need a GPU
    _apply_liger_kernel_to_instance(model=model, **off)


def fused_head_of_trl(model):
    utils = pytest.importorskip("trl.trainer.utils", reason="trl is not installed")
    utils.add_fused_lm_head(model)
    model.forward = functools.partial(model.forward, fused_lm_head=True)


def labels_taken_away(model):
    ours = model.forward
    model.forward = lambda labels=None, gft_advantages=None, **kwargs: ours(**kwargs)


def columns_taken_away(model):
    ours = model.forward
    model.forward = lambda gft_advantages=None, **kwargs: ours(**kwargs)


REPLACEMENTS = {
    f.__name__: f for f in (another_forward, liger, fused_head_of_trl, labels_taken_away, columns_taken_away)
}


def lora(model):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPINGS = {
    "bare": (lambda model: model, patch_model),
    "PEFT, then the patch": (lora, patch_model),
    "the patch, then PEFT": (patch_model, lora),
    "compiled, then the patch": (compiled, patch_model),
    "the patch, then compiled": (patch_model, compiled),
}
CASES = [(r, "bare") for r in REPLACEMENTS]  # the wrappings see whether a loss or its columns are lost, not who did it
CASES += [(r, w) for w in WRAPPINGS for r in ("another_forward", "columns_taken_away") if w != "bare"]
# PEFT calls a wrapped forward past every hook, and the loss is reached without its columns: nobody can tell.
CASES.remove(("columns_taken_away", "the patch, then PEFT"))


@pytest.mark.parametrize(("replacement", "wrapping"), CASES)
def test_a_batch_that_does_not_reach_the_loss_is_an_error(replacement, wrapping):
    model = inner = tiny("llama").train()
    for wrap in WRAPPINGS[wrapping]:
        model = wrap(model)
    REPLACEMENTS[replacement](inner)
    with pytest.raises(ValueError, match=r"must (reach the patched forward of Llama|come with every training call)"):
        model(**batch("right"), gft_advantages=ADVANTAGES_S)


PAST = {
    "the class's forward": lambda model, inputs: type(model).forward(model, **inputs).loss,
    "trunk and head by hand": lambda model, inputs: model.lm_head(model.model(**model_inputs(inputs))[0]).mean(),
    "the trunk, and the head's weight": lambda model, inputs: (
        model.model(**model_inputs(inputs))[0] @ model.lm_head.weight.mT
    ).mean(),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("way", PAST)
def test_a_loss_made_past_the_forward_is_refused(way, wrapping):
    """As a wrapper that calls the class's forward does, or a library with a chunked head of its own."""
    model = inner = tiny("llama").train()
    for wrap in WRAPPINGS[wrapping]:
        model = wrap(model)
    inputs = {**batch("right"), "gft_advantages": ADVANTAGES_S}
    refused = r"^a training call must reach the patched forward of Llama.*that went past it; call the model itself"
    with pytest.raises(ValueError, match=refused):
        PAST[way](inner, inputs)
    with torch.no_grad():
        assert PAST[way](inner, inputs).isfinite()
    assert PAST[way](inner.eval(), inputs).isfinite()
    assert model.train()(**inputs).loss.isfinite() and not inner._gft_forward.guard.running
    unpatch_model(model)
    assert PAST[way](inner, inputs).isfinite()


def test_what_trains_nothing_of_the_model_is_not_refused():
    """A reward head on the states of a frozen model, and a trunk that backward runs again."""
    model, inputs = patch_model(tiny("llama")).train(), batch("right")
    states = model.requires_grad_(False).model(**model_inputs(inputs))[0]
    torch.nn.Linear(states.shape[-1], 1)(states).sum().backward()
    wrapper = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    model, plain = tiny("llama"), tiny("llama")
    theirs = unfused(plain, inputs)
    patch_model(model).train()
    model.model = wrapper.checkpoint_wrapper(model.model)
    (UPSTREAM * model(**inputs, gft_advantages=ADVANTAGES_S).loss).backward()
    found = {name.replace("._checkpoint_wrapped_module", ""): g for name, g in gradients(model).items()}
    torch.testing.assert_close(found, theirs[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("replacement", REPLACEMENTS)
def test_evaluation_is_held_to_it_too(replacement):
    model = tiny("llama")
    REPLACEMENTS[replacement](patch_model(model))
    with torch.no_grad(), pytest.raises(ValueError, match="must reach the patched forward of LlamaForCausalLM, got a"):
        model.eval()(**batch("right"), gft_advantages=ADVANTAGES_S)


def test_liger_before_the_patch_keeps_working():
    model, inputs = tiny("llama"), batch("right")
    theirs = unfused(model, inputs)
    liger(model)
    assert_same(patched(patch_model(model).train(), inputs), theirs)
    assert model.eval()(**model_inputs(inputs)).logits.requires_grad


def test_a_class_whose_forward_is_replaced_still_calls_the_patched_one(monkeypatch):
    model, inputs = tiny("llama"), batch("right")
    theirs = unfused(model, inputs)
    liger(other := tiny("llama"))
    patch_model(model)
    monkeypatch.setattr(type(model), "forward", other.forward.__func__)
    assert_same(patched(model.train(), inputs), theirs)


def test_logits_are_for_looking_at_not_for_training_on():
    """Label smoothing, a compute_loss_func, another loss of the logits: they train a model without labels."""
    model, inputs = patch_model(tiny("llama")).train(), model_inputs(batch("right"))
    with pytest.raises(ValueError, match="labels must come with every training call of a patched Llama"):
        model(**inputs)
    with torch.no_grad():
        assert model(**inputs).logits is not None
    assert model.generate(**inputs, max_new_tokens=2, pad_token_id=0) is not None
    assert model.eval()(**inputs).logits.requires_grad
    assert copy.deepcopy(model).train().requires_grad_(False)(**inputs).logits is not None
    assert unpatch_model(model.train())(**inputs).logits.requires_grad


def test_calls_that_fail_or_lie_in_one_another_are_told_apart():
    model, inputs = tiny("llama"), batch("right")
    theirs = unfused(model, inputs)
    wrapped = patch_model(lora(tiny("llama")))  # two guarded doors, one inside the other
    patch_model(model)
    for target in (model, wrapped):
        with pytest.raises(ValueError, match="targets must lie in"):
            target(**{**inputs, "labels": inputs["labels"] + 1000})
        with pytest.raises(TypeError, match="tua must be an option"):
            target(**inputs, gft_tua=1)
        assert target(**inputs).loss.isfinite()
    assert "forward" not in model.lm_head.__dict__ and not model.lm_head._forward_hooks
    nested = []

    def look(module, args, kwargs):  # as a callback that samples, or a reference model that is the model
        if not nested:
            nested.append(None)
            nested.append(model(**inputs).loss)
            with torch.no_grad():
                nested.append(module(**model_inputs(inputs)).logits)

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    assert_same(patched(model, inputs), theirs)
    handle.remove()
    another_forward(model)
    with pytest.raises(ValueError, match=r"labels must reach .* but through test_guard.another_forward"):
        model(**inputs)
    assert not model._gft_forward.guard.open


INSIDE = {
    "logits": lambda model, inputs: model(**model_inputs(inputs)).logits,
    "generate": lambda model, inputs: model.generate(
        **model_inputs(inputs), max_new_tokens=1, return_dict_in_generate=True, output_logits=True, pad_token_id=0
    ).logits[0],
    "a loss": lambda model, inputs: model(**inputs, gft_advantages=ADVANTAGES_S.flip(0)).loss,
}


@pytest.mark.parametrize("known", [False, True], ids=["first call", "later call"])
@pytest.mark.parametrize("way", INSIDE)
def test_a_call_inside_a_call_that_computes_its_loss_has_a_head_of_its_own(way, known):
    """As a probe on a layer that samples, or asks the model about other rows; the loss around it stays in the head."""
    model, inputs = tiny("llama"), batch("right")
    theirs = unfused(model, inputs)
    patch_model(model).train()
    with torch.no_grad():
        expected = INSIDE[way](model, inputs)
    if not known:
        unpatch_model(model)
        patch_model(model)
    found = []

    def probe(*_):
        if not found:
            found.append(None)
            with torch.no_grad():
                found.append(INSIDE[way](model, inputs))

    handle = model.model.layers[0].register_forward_hook(probe)
    assert_same(patched(model, inputs), theirs)
    handle.remove()
    torch.testing.assert_close(found[1], expected)
    assert "forward" not in model.lm_head.__dict__ and not model._gft_forward.guard.open
    assert_same(patched(model, inputs), theirs)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_has_weights_and_a_guard_of_its_own(duplicate):
    model, inputs = patch_model(tiny("llama")), batch("right")
    patched(model, inputs)
    twin = duplicate(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    found = patched(twin, inputs)
    assert not gradients(model)
    another_forward(twin)
    with pytest.raises(ValueError, match="labels must reach"):
        twin(**inputs)
    assert model.train()(**inputs).loss.isfinite()
    del twin.forward
    assert_same(found, unfused(unpatch_model(twin), inputs))


def test_unpatching_takes_the_guard_away():
    inner = tiny("llama")
    model = patch_model(lora(inner)).train()
    unpatch_model(model)
    for module in (model, inner, inner.model):
        assert not module._forward_pre_hooks and not module._forward_hooks
    another_forward(inner)
    assert inner(**batch("right"))[0].isfinite() and model(**model_inputs(batch("right"))).logits.requires_grad


def test_a_checkpointed_model_is_called_twice():
    wrapper = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    model, inputs = tiny("llama"), batch("right")
    theirs = unfused(model, inputs)
    loss = wrapper.checkpoint_wrapper(patch_model(model.train()))(**inputs, gft_advantages=ADVANTAGES_S).loss
    (UPSTREAM * loss).backward()
    assert_same((loss.item(), gradients(model)), theirs)
    assert not model._gft_forward.guard.open


class Smoothed(Trainer):
    """Not Trainer's own label smoothing, but the same thing: another loss, of the logits."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


OTHERS_LOSSES = {
    "label smoothing": ({"label_smoothing_factor": 0.1}, {}, Trainer),
    "compute_loss_func": ({}, {"compute_loss_func": lambda outputs, labels, **_: outputs.logits.mean()}, Trainer),
    "a compute_loss": ({}, {}, Smoothed),
    "liger": ({"use_liger_kernel": True}, {}, Trainer),
}


@pytest.mark.parametrize("columns", [True, False], ids=["with advantages", "labels alone"])
@pytest.mark.parametrize("case", OTHERS_LOSSES)
def test_a_trainer_with_a_loss_of_its_own_is_refused(case, columns, tmp_path):
    options, arguments, trainer_class = OTHERS_LOSSES[case]
    if case == "liger":
        pytest.importorskip("liger_kernel", reason="liger_kernel is not installed")
        options = {**options, "liger_kernel_config": dict.fromkeys(("rope", "rms_norm", "swiglu"), False)}
    rows = [{name: x[s] for name, x in batch().items()} for s in range(4)]
    rows = [{**row, **({"gft_advantages": 1.0 + s} if columns else {})} for s, row in enumerate(rows)]
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, save_strategy="no", **options)
    trainer = trainer_class(patch_model(tiny("llama")), args, train_dataset=rows, **arguments)
    told = "^(gft_advantages, labels|labels|a training call) must reach the patched forward.*use_liger_kernel"
    if case != "liger":
        given = (
            "be given with gft_advantages, got None; pass labels= to" if columns else "come with every training call"
        )
        told = (
            rf"^labels must {given}.* switch off what makes .* a loss of its own .*label smoothing, compute_loss_func"
        )
    with pytest.raises(ValueError, match=told):
        trainer.train()


@pytest.mark.parametrize("eval_logits", [True, False])
def test_metrics_of_the_logits_need_eval_logits(eval_logits, tmp_path):
    model, inputs = tiny("cohere"), batch()
    with torch.no_grad():
        logits = model(input_ids=inputs["input_ids"]).logits
    rows = [{name: x[s] for name, x in inputs.items()} | {"gft_advantages": ADVANTAGES_S[s]} for s in range(4)]
    seen = []
    trainer = Trainer(
        patch_model(model, eval_logits=eval_logits),
        TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, per_device_eval_batch_size=4, max_steps=1),
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=lambda p: seen.append(p.predictions) or {},
        preprocess_logits_for_metrics=lambda logits, labels: logits,
    )
    loss = trainer.evaluate()["eval_loss"]
    expected, _ = unfused(unpatch_model(copy.deepcopy(model)), inputs)
    assert loss == pytest.approx(expected, rel=1e-4)
    if not eval_logits:
        assert seen == [()]  # there are none
        return
    torch.testing.assert_close(torch.as_tensor(seen[0]), logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.as_tensor(trainer.predict(rows).predictions), logits, rtol=1e-4, atol=1e-4)
    assert model.train()(**inputs).logits is None
