"""Patched Hugging Face models against the same models' logits, shifted, in gft_loss; what patching must not touch."""

from __future__ import annotations

import contextlib
import copy
import inspect
import unittest.mock

import oracle
import pytest
import torch
import torch.utils.flop_counter
import transformers
from tiny_families import FAMILIES, HIDDEN, VOCABULARY, tiny
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gft_kernels import gft_loss, policy_loss
from gft_kernels.model import shared_prompts
from gft_kernels.model.patch import patch_model, unpatch_model

# The logits path would compute the right thing the wrong way: unless a test asks for it, its warning is an error.
pytestmark = pytest.mark.filterwarnings("error:the GFT loss")

S, L = 4, 7
ADVANTAGES_S = torch.tensor([0.7, -0.4, 1.3, 0.0])
UPSTREAM = 1.7


def batch(padding: str = "none", seed: int = 1) -> dict:
    """Rows of random tokens whose first two are prompts; on one side padded to different lengths."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCABULARY, (S, L), generator=generator)
    labels = input_ids.clone()
    labels[:, :2] = -100
    inputs = {"input_ids": input_ids, "labels": labels}
    if padding == "none":
        return inputs
    mask = torch.ones_like(input_ids)
    for s, absent in enumerate((0, 1, 3, 2)):
        where = slice(0, absent) if padding == "left" else slice(L - absent, L)
        mask[s, where], input_ids[s, where], labels[s, where] = 0, 0, -100
        labels[s, absent : absent + 2] = -100 if padding == "left" else labels[s, absent : absent + 2]
    return {**inputs, "attention_mask": mask}


def packed(lengths=(3, 4, 2, 5), seed: int = 2) -> dict:
    """The same kind of rows one after the other in one row; the first label of each is nobody's prediction."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCABULARY, (1, sum(lengths)), generator=generator)
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    sequence_ids = torch.cat([torch.full((n,), s) for s, n in enumerate(lengths)])[None]
    labels = torch.where(position_ids == 0, -100, input_ids)
    return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids, "gft_sequence_ids": sequence_ids}


def model_inputs(inputs: dict) -> dict:
    return {name: value for name, value in inputs.items() if name not in ("labels", "gft_sequence_ids")}


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def unfused(model, inputs: dict, **options):
    """Loss and gradients from all the logits of a model that is not patched."""
    # Without a cache, for with one transformers does not see in position_ids where a packed sequence ends.
    logits = model(**model_inputs(inputs), use_cache=False).logits[:, :-1]
    targets = inputs["labels"][:, 1:]
    if "gft_sequence_ids" in inputs:
        logits, targets = logits.flatten(0, 1), targets.flatten()
        options["sequence_ids"] = inputs["gft_sequence_ids"][:, 1:].flatten()
    loss = gft_loss(logits, targets, **{"advantages": ADVANTAGES_S, **options})
    (UPSTREAM * loss).backward()
    return loss.item(), gradients(model)


def patched(model, inputs: dict, **call):
    output = model(**inputs, **{"gft_advantages": ADVANTAGES_S, **call})
    assert output.logits is None
    (UPSTREAM * output.loss).backward()
    return output.loss.item(), gradients(model)


def assert_same(ours, theirs, tolerance=2e-5):
    (loss, ours), (expected, theirs) = ours, theirs
    assert loss == pytest.approx(expected, rel=tolerance, abs=1e-7)
    assert ours.keys() == theirs.keys() and ours
    largest = max(g.norm() for g in theirs.values())
    assert largest > 5e-3
    for name, gradient in theirs.items():
        error = (ours[name] - gradient).norm()
        # Some gradients are zero but for rounding (a key's bias moves all of its scores alike).
        assert error <= tolerance * (gradient.norm() + 0.05 * largest), f"{name}: {error} of {gradient.norm()}"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_loss_and_gradients_of_its_logits(family):
    model = tiny(family)
    batches = [batch("right"), batch("left")]
    if "position_ids" in inspect.signature(model.forward).parameters:
        batches.append(packed())
    expected = [unfused(model, inputs) for inputs in batches]
    patch_model(model)
    for inputs, theirs in zip(batches, expected, strict=True):
        assert_same(patched(model, inputs), theirs)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_rows_and_labels_meet_as_in_unpadded_float64_rows(family, padding):
    """One row at a time, no padding, textbook loss: an error of one position or of the padding's side shows."""
    model, inputs = tiny(family), batch(padding)
    if family == "gpt2":  # absolute positions must be given under left padding, as generate does
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    total, live = torch.zeros((), dtype=torch.float64), 0
    wide = copy.deepcopy(model).double()
    for s in range(S):
        there = inputs["attention_mask"][s].bool()
        ids, labels = inputs["input_ids"][s][there], inputs["labels"][s][there]
        logits = wide(ids[None]).logits[0, :-1]
        targets = labels[1:]
        live_R = targets != -100
        losses = oracle.policy_losses(logits, targets, live_R, ADVANTAGES_S[s].expand(len(targets)))
        total, live = total + losses.sum(), live + int(live_R.sum())
    (UPSTREAM * total / live).backward()
    loss, ours = patched(patch_model(model), inputs)
    assert_same((loss, {k: g.double() for k, g in ours.items()}), (total.item() / live, gradients(wide)))


CALLS = {
    "advantages per token": (lambda: {"advantages": torch.linspace(-1.0, 2.0, S * L).view(S, L)}, {}),
    "rewards": (lambda: {"rewards": torch.tensor([1.0, 0.0, 0.3, 0.9])}, {"group_size": 2}),
    "groups in any order": (lambda: {"rewards": torch.tensor([1.0, 0.3, 0.0, 0.9]),
                                     "group_ids": torch.tensor([5, 2, 5, 2])}, {"normalize": "leave-one-out"}),
    "neither: A = 1": (lambda: {}, {"tau": 1.0}),
    "mask": (lambda: {"mask": torch.arange(S * L).view(S, L) % 3 > 0}, {}),
    "denominator of the whole batch": (lambda: {"num_items_in_batch": torch.tensor(57)}, {}),
    "responses": (lambda: {"num_items_in_batch": 9}, {"reduction": "sequence-mean"}),
    "objective": (lambda: {}, {"tau": 0.3, "rectify": "positive", "temperature": 1.4, "reduction": "sum"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("for_all_calls", [True, False])
def test_what_a_call_may_bring(case, for_all_calls):
    brought, options = CALLS[case][0](), CALLS[case][1]
    if not any(name in brought for name in ("advantages", "rewards")) and case != "neither: A = 1":
        brought["advantages"] = ADVANTAGES_S
    model, inputs = tiny("gemma2"), batch("right")
    shifted = {k: v[:, 1:] if isinstance(v, torch.Tensor) and v.shape == (S, L) else v for k, v in brought.items()}
    theirs = unfused(model, inputs, **{"advantages": None, **shifted, **options})
    patch_model(model, **(options if for_all_calls else {}))
    call = {k if k == "num_items_in_batch" else f"gft_{k}": v for k, v in brought.items()}
    call |= {} if for_all_calls else {f"gft_{k}": v for k, v in options.items()}
    assert_same(patched(model, inputs, **{"gft_advantages": None, **call}), theirs)


OBJECTIVES = {
    "sft": {"advantages": None},
    "dft": {"advantages": None},
    "grpo": {"clip_low": 0.1, "beta": 0.2, "entropy_coef": 0.05},
    "dapo": {"entropy_coef": 0.1},
    "dr_grpo": {"num_items_in_batch": 40},
    "cispo": {"clip_high": 1.5, "beta": 0.3},
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("fallback", [False, True], ids=["in the head", "from the logits"])
def test_every_objective_of_policy_loss(objective, fallback):
    """Old and reference log-probabilities are shifted with the labels; tests/loss/test_policy.py has the oracle."""
    model, inputs = tiny("gemma2"), batch("left")
    options = dict(OBJECTIVES[objective])
    noise = torch.randn(2, S, L, generator=torch.Generator().manual_seed(5)) * 0.4
    with torch.no_grad():
        log_pi = model(**model_inputs(inputs)).logits[:, :-1].log_softmax(-1)
        log_pi = log_pi.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    aligned = {}
    if objective not in ("sft", "dft"):
        aligned["old_log_probs"] = log_pi + noise[0, :, 1:]
    if "beta" in options:
        aligned["ref_log_probs"] = log_pi + noise[1, :, 1:]
    logits = model(**model_inputs(inputs)).logits[:, :-1]
    rest = {"advantages": ADVANTAGES_S, **options}
    loss = policy_loss(logits, inputs["labels"][:, 1:], objective=objective, **aligned, **rest)
    (UPSTREAM * loss).backward()
    theirs = loss.item(), gradients(model)
    if fallback:
        replaced_forward(model, factor=1.0)
    items = options.pop("num_items_in_batch", None)
    patch_model(model, objective=objective, **{k: v for k, v in options.items() if v is not None})
    call = {f"gft_{k}": torch.nn.functional.pad(v, (1, 0), value=7.0) for k, v in aligned.items()}
    call |= {"gft_advantages": options.get("advantages", ADVANTAGES_S), "num_items_in_batch": items}
    with pytest.warns(UserWarning, match="replaced the forward") if fallback else contextlib.nullcontext():
        assert_same(patched(model, inputs, **call), theirs)


def test_only_a_mean_over_tokens_takes_the_trainers_token_count():
    for options, takes in (
        ({}, True),
        ({"reduction": "sequence-mean"}, False),
        ({"objective": "dapo"}, True),
        ({"objective": "grpo"}, False),
        ({"objective": "grpo", "reduction": "token-mean"}, True),
        ({"objective": "dr_grpo"}, False),  # its denominator is no count of tokens
    ):
        assert patch_model(tiny("llama"), **options).accepts_loss_kwargs is takes, options


def test_statistics_lie_where_the_next_token_is_predicted():
    model, inputs = patch_model(tiny("llama")), batch("left")
    with torch.no_grad():
        output = model(**inputs, gft_advantages=ADVANTAGES_S, gft_return_stats=True, gft_return_entropy=True)
        log_pi = model(**model_inputs(inputs)).logits.log_softmax(-1)
    assert isinstance(output, transformers.modeling_outputs.CausalLMOutputWithPast)
    for s, t in (inputs["labels"][:, 1:] != -100).nonzero().tolist():
        expected = log_pi[s, t, inputs["labels"][s, t + 1]]
        torch.testing.assert_close(output.stats.log_probs[s, t], expected, rtol=1e-4, atol=1e-4)
        assert output.stats.entropy[s, t] > 0 and output.stats.advantages[s, t] == ADVANTAGES_S[s]
    assert (output.stats.log_probs[:, -1] == 0).all()


@pytest.mark.parametrize("keep", [6, torch.tensor([5, 1, 3, 2, 4])])
def test_logits_to_keep_and_shift_labels_choose_the_same_rows(keep):
    model, inputs = tiny("llama"), batch()
    aligned = torch.cat([inputs["labels"][:, 1:], torch.full((S, 1), -100)], 1)
    aligned = aligned[:, -keep:] if isinstance(keep, int) else aligned[:, keep]
    loss = gft_loss(model(inputs["input_ids"], logits_to_keep=keep).logits, aligned, advantages=ADVANTAGES_S)
    (UPSTREAM * loss).backward()
    theirs = loss.item(), gradients(model)
    patch_model(model)
    assert_same(patched(model, inputs, logits_to_keep=keep), theirs)
    inputs = {"input_ids": inputs["input_ids"], "shift_labels": aligned}
    assert_same(patched(model, inputs, logits_to_keep=keep), theirs)


@pytest.mark.parametrize("keep", [4, torch.tensor([2, 4, 5])])
def test_a_label_whose_row_is_not_kept(keep):
    model, inputs = patch_model(tiny("llama")), batch()
    with pytest.raises(ValueError, match=r"^logits_to_keep must keep .* got none for the label at position 2 of row 0"):
        model(**inputs, logits_to_keep=keep)
    lost = torch.arange(L) < 4 if isinstance(keep, int) else ~torch.isin(torch.arange(L) - 1, keep)
    expected = patched(model, {**inputs, "labels": inputs["labels"].where(~lost, -100)}, logits_to_keep=keep)
    assert_same(patched(model, inputs, gft_mask=(~lost).expand(S, L), logits_to_keep=keep), expected)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:  # as where memory is estimated: there are no numbers
        assert model(**{name: fake.from_tensor(x) for name, x in inputs.items()}, logits_to_keep=keep).loss.shape == ()


class LargestLogits(TorchDispatchMode):
    """The most logits any operation returned."""

    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) == (HIDDEN, VOCABULARY):
                continue  # the head's weight, transposed
            if tensor.dim() and tensor.shape[-1] == VOCABULARY:
                self.rows = max(self.rows, tensor.numel() // VOCABULARY)
        return out


def test_the_model_makes_no_logits():
    """Those inside gft_linear_loss come in chunks of rows; tests/linear/test_linear.py watches them."""
    model, inputs = tiny("gemma2"), batch()
    with LargestLogits() as all_of_them:
        model(**model_inputs(inputs))
    assert all_of_them.rows == S * L
    patch_model(model)
    for probes in (1, 0):  # the first call sends one row of known logits through the model's code
        with LargestLogits() as seen:
            patched(model, inputs)
        assert seen.rows == probes


def test_generate_and_files_are_as_before(tmp_path):
    model, inputs = tiny("gemma2"), batch("left")
    prompts = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    before, keys = model.generate(**prompts, **options), list(model.state_dict())
    unpatched_loss = model(**inputs).loss
    patch_model(model)
    patched(model, inputs)
    assert torch.equal(model.generate(**prompts, **options), before)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.architectures == ["Gemma2ForCausalLM"]
    for ours, theirs in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert loaded(**inputs).loss == unpatched_loss  # a file carries no patch


def test_unpatching_leaves_nothing_behind():
    model, inputs = tiny("cohere"), batch()
    before, loss = set(model.__dict__), model(**inputs).loss
    head_before = set(model.lm_head.__dict__)
    assert patch_model(model) is model
    patched(model, inputs)
    assert model(**inputs).loss != loss
    assert unpatch_model(model) is model
    assert set(model.__dict__) == before and set(model.lm_head.__dict__) == head_before
    assert not model.lm_head._forward_hooks
    output = model(**inputs)
    assert output.loss == loss and output.logits is not None


def test_a_second_patch_replaces_the_first():
    model, inputs = tiny("llama"), batch()
    before = set(model.__dict__)
    once = patch_model(copy.deepcopy(model), tau=0.2)(**inputs).loss
    assert patch_model(patch_model(model, tau=0.9), tau=0.2)(**inputs).loss == once
    assert set(unpatch_model(model).__dict__) == before


def test_unpatching_under_another_librarys_wrapper_passes_calls_on():
    model, inputs = tiny("llama"), batch()
    loss = model(**inputs).loss
    patch_model(model)
    ours = model.forward
    model.forward = lambda *args, **kwargs: ours(*args, **kwargs)  # as accelerate wraps forward for mixed precision
    unpatch_model(model)
    assert model(**inputs).loss == loss


def test_accelerates_mixed_precision_wraps_and_unwraps():
    utils = pytest.importorskip("accelerate.utils", reason="accelerate is not installed")
    model, inputs = patch_model(tiny("gemma2"), return_stats=True), batch()
    loss = model(**inputs).loss
    model._original_forward = model.forward  # as Accelerator.prepare_model does
    model.forward = utils.convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
    mixed = model(**inputs)
    assert mixed.loss.item() == pytest.approx(loss.item(), rel=0.05) and mixed.loss != loss
    assert mixed.stats.log_probs.shape == inputs["labels"].shape
    assert utils.extract_model_from_parallel(model, keep_fp32_wrapper=False)(**inputs).loss == loss


@pytest.mark.slow
def test_a_compiled_model():
    """With graph breaks, for the patch looks at the head; the layers are compiled."""
    model, inputs = tiny("gpt2"), batch("right")  # has the fewest lines to trace
    theirs = unfused(model, inputs)
    compiled = torch.compile(patch_model(model), backend="eager")
    for _ in range(2):
        loss = (output := compiled(**inputs, gft_advantages=ADVANTAGES_S)).loss
        assert output.logits is None
        (UPSTREAM * loss).backward()
        assert_same((loss.item(), gradients(model)), theirs)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model, inputs = tiny("llama-tied"), batch("right")
    theirs = unfused(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    assert_same(patched(patch_model(model), inputs), theirs)


@pytest.mark.parametrize("family", ["gemma2", "cohere", "gptj"])
@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
def test_bfloat16(family, precision):
    """The probes are rounded as the model's own logits are, and must still be recognised."""
    model, inputs = tiny(family), batch("right")
    expected = unfused(model, inputs)
    if precision == "bfloat16":
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        loss, found = patched(patch_model(model), inputs)
    assert_same((loss, {k: g.float() for k, g in found.items()}), expected, tolerance=0.08)


def test_an_output_as_a_tuple():
    model, inputs = patch_model(tiny("llama")), batch()
    loss = model(**inputs).loss
    (only,) = model(inputs["input_ids"], labels=inputs["labels"], return_dict=False)
    assert only == loss


def test_a_head_by_name():
    model, inputs = tiny("gpt_neox"), batch()
    theirs = unfused(model, inputs)
    model.get_output_embeddings = lambda: None
    with pytest.raises(ValueError, match="model must have an output head"):
        patch_model(model)
    (name,) = (name for name, module in model.named_modules() if getattr(module, "out_features", 0) == VOCABULARY)
    assert_same(patched(patch_model(model, head=name), inputs), theirs)


class UnknownTransform(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output


class HeadTwice(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs) if super().forward(*args, **kwargs) is not None else None


class NormedHead(torch.nn.Linear):
    def forward(self, hidden):
        return super().forward(hidden) * 0.9


def normed_head(model):
    head = NormedHead(32, VOCABULARY, bias=False)
    head.load_state_dict(model.lm_head.state_dict())
    model.lm_head = head


def replaced_forward(model, factor=1.1):
    own = model.lm_head.forward
    model.lm_head.forward = lambda hidden: own(hidden) * factor


FALLBACKS = {
    "what the model does to its logits": lambda m: setattr(m, "__class__", UnknownTransform),
    "more than once": lambda m: setattr(m, "__class__", HeadTwice),
    r"not hidden @ weight": normed_head,
    "replaced the forward": replaced_forward,
}


@pytest.mark.parametrize("reason", FALLBACKS)
def test_a_head_that_is_not_understood_takes_the_logits_and_says_so_once(reason):
    model, inputs = tiny("llama"), batch("right")
    FALLBACKS[reason](model)
    theirs = unfused(model, inputs)
    patch_model(model, chunk_rows=3, filter_eps=0.01)
    with pytest.warns(UserWarning, match=f"computed from all of its logits.*{reason}"):
        assert_same(patched(model, inputs), theirs)
    assert_same(patched(model, inputs), theirs)  # a second warning would be an error here


@pytest.mark.parametrize(("family", "own"), [("llama", True), ("hyperclovax", False)])
def test_a_first_call_reads_a_cache_as_it_came_though_the_model_runs_twice(family, own):
    """For the logits, or since what it does to them was not the likeliest; a run adds its rows to the cache."""
    model, inputs = tiny(family), batch()
    name = shared_prompts.cache_name(model)
    if own:
        model.__class__ = UnknownTransform

    def cache():  # with its graph, as prefix tuning's
        return {name: model(input_ids=torch.full((S, 3), 5), use_cache=True)[name]}

    logits = model(**model_inputs(inputs), **cache()).logits[:, :-1]
    loss = gft_loss(logits, inputs["labels"][:, 1:], advantages=ADVANTAGES_S)
    (UPSTREAM * loss).backward()
    theirs = loss.item(), gradients(model)
    patch_model(model)
    with pytest.warns(UserWarning, match="neither a scale") if own else contextlib.nullcontext():
        assert_same(patched(model, inputs, **cache()), theirs)
    written_over = transformers.StaticCache(config=model.config, max_cache_len=20)
    with pytest.raises(ValueError, match=f"^{name} must be left out of the first call .* got one of Static"):
        patch_model(model)(**inputs, **{name: written_over})


CHANGES = {
    "another head": ("llama", normed_head, r"not hidden @ weight"),
    "the head's class": ("llama", lambda m: setattr(m.lm_head, "__class__", NormedHead), r"not hidden @ weight"),
    "a number of the config": ("gemma2", lambda m: setattr(m.config, "final_logit_softcapping", 0.9), None),
    "no number any more": ("gemma2", lambda m: setattr(m.config, "final_logit_softcapping", None), None),
    "a number of the model": ("cohere", lambda m: setattr(m, "logit_scale", 0.9), None),
    "a number of the config that the model does not read": (
        "cohere", lambda m: setattr(m.config, "logit_scale", 0.9), None),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_a_model_that_changes_after_its_first_call(case):
    family, change, warned = CHANGES[case]
    model, inputs = tiny(family), batch("right")
    patched(patch_model(model), inputs)
    change(model)
    with pytest.warns(UserWarning, match=warned) if warned else contextlib.nullcontext():
        ours = patched(model, inputs)
    assert_same(ours, unfused(unpatch_model(model), inputs))


HOOKS = {
    "forward": lambda model, hook: model.lm_head.register_forward_hook(lambda m, args, out: hook(out)),
    "forward of every module": lambda model, hook: torch.nn.modules.module.register_module_forward_hook(
        lambda m, args, out: hook(out) if m is model.lm_head else None
    ),
    "backward": lambda model, hook: model.lm_head.register_full_backward_hook(lambda m, i, o: (hook(o[0]), None)[1]),
    "before backward": lambda model, hook: model.lm_head.register_full_backward_pre_hook(lambda m, o: (hook(o[0]),)),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_on_the_head_is_given_logits(kind):
    """Not the loss in their place; it may come after the first call, and go again."""
    model, inputs = patch_model(tiny("llama")), batch("right")
    shapes = []
    plain = patched(model, inputs)
    handle = HOOKS[kind](model, lambda logits: shapes.append(logits.shape) or logits * 0.5)
    with pytest.warns(UserWarning, match=r"a hook on the output head needs them \(test_hf\.<lambda>"):
        ours = patched(model, inputs)
    assert shapes[0] == (S, L, VOCABULARY)
    unpatch_model(model)
    assert_same(ours, unfused(model, inputs))
    handle.remove()
    assert_same(patched(patch_model(model), inputs), plain)


def test_hooks_that_only_measure_leave_the_loss_in_the_head(monkeypatch):
    model, inputs = patch_model(tiny("llama")), batch("right")
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        patched(model, inputs)
    offloading = pytest.importorskip("trl.models.activation_offloading", reason="trl is not installed")
    monkeypatch.setattr(offloading, "OffloadActivations", lambda **_: unittest.mock.MagicMock())  # needs a GPU
    offloading.get_act_offloading_ctx_manager(model)
    assert model.lm_head._forward_hooks
    patched(model, inputs)


def test_refusals():
    inputs = batch()
    model = tiny("llama")
    for options, error, message in (
        ({"softcap": 3.0}, TypeError, "softcap must be left to the model"),
        ({"rewards": ADVANTAGES_S}, TypeError, "rewards must come with each call"),
        ({"inplace": True}, TypeError, "inplace must be left to the model"),
        ({"old_log_probs": ADVANTAGES_S}, TypeError, "old_log_probs must come with each call"),
        ({"tua": 0.5}, TypeError, "tua must be an option of policy_loss"),
    ):
        with pytest.raises(error, match=message):
            patch_model(model, **options)
    with pytest.raises(ValueError, match="model must have been patched"):
        unpatch_model(model)
    patch_model(model)
    for call, error, message in (
        ({"gft_advantages": ADVANTAGES_S, "labels": None}, ValueError, "labels must be given with gft_advantages"),
        ({"gft_softcap": 3.0}, TypeError, "gft_softcap must be left to the model"),
        ({"gft_tua": 0.5}, TypeError, "tua must be an option"),
        ({"labels": inputs["labels"][:, 1:]}, ValueError, "labels must cover"),
        ({"gft_objective": "grpo", "gft_tau": 0.5}, ValueError, "tau must be left out with objective='grpo'"),
        ({"gft_num_items_in_batch": 3}, TypeError, "pass num_items_in_batch="),
    ):
        with pytest.raises(error, match=message):
            model(**{**inputs, **call})
    model.__class__ = UnknownTransform  # takes *args, in which nobody can find the labels
    with pytest.raises(TypeError, match=r"^UnknownTransform must be given at most 0 arguments by position, got 1;"):
        patch_model(model)(inputs["input_ids"], labels=inputs["labels"])
    t5 = transformers.T5Config(vocab_size=101, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="model must be a decoder-only"):
        patch_model(transformers.T5ForConditionalGeneration(t5))
