"""A prompt computed once for its responses: loss and gradients are those of whole rows, or the model says why not."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from test_hf import assert_same, patched, unfused
from tiny_families import COMMON, FAMILIES, VOCABULARY, tiny

from gft_kernels.model import shared_prompts
from gft_kernels.model.patch import patch_model

pytestmark = pytest.mark.filterwarnings("error:the GFT loss")

REFUSED = {
    # family: why, as far as it can be read off the model, or is found out by trying
    **dict.fromkeys(("mistral", "gemma2", "gemma3", "cohere2"), "DynamicSlidingWindowLayer"),
    **dict.fromkeys(("recurrent_gemma", "mamba"), "LinearAttentionLayer"),
    "falcon_h1": "LinearAttentionAndFullAttentionLayer",
    "mpt": "computes other numbers",  # its alibi counts padding between prompt and response
}
SIZES = [(5, (4, 2, 3)), (1, (3,)), (3, (1, 4)), (2, ())]  # (tokens of a prompt, tokens of each of its responses)
CACHE = shared_prompts.cache_name(tiny("llama"))
ADVANTAGES_S = torch.tensor([0.7, -0.4, 1.3, 0.0, -1.1, 0.6])


def groups():
    generator = torch.Generator().manual_seed(4)

    def drawn(n):
        return torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()

    return [(drawn(prompt), [drawn(n) for n in responses]) for prompt, responses in SIZES]


def whole_rows(model, padding: str) -> dict:
    """The same responses, each behind a copy of its prompt, padded on one side."""
    rows = [(prompt, response) for prompt, responses in groups() for response in responses]
    texts = [torch.tensor([*prompt, *response]) for prompt, response in rows]
    labels = [torch.tensor([-100] * len(prompt) + response) for prompt, response in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    inputs = {
        "input_ids": pad(texts, True, 0, padding),
        "labels": pad(labels, True, -100, padding),
        "attention_mask": pad([torch.ones_like(text) for text in texts], True, 0, padding),
    }
    if padding == "left" and "position_ids" in inspect.signature(type(model).forward).parameters:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return inputs


def shared(**call) -> dict:
    inputs, targets_SR = shared_prompts.layout(groups(), pad_id=0)
    return {**inputs, "shift_labels": targets_SR, **call}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_loss_and_gradients_of_whole_rows_or_says_why_not(family):
    model = tiny(family)
    reason = shared_prompts.refusal_of_cache(model) or shared_prompts.refusal_of_trial(model)
    if family in REFUSED:
        assert REFUSED[family] in reason
        with pytest.raises(ValueError, match="gft_prompt_ids must be left out") as refusal:
            patch_model(model)(**shared())
        assert reason in str(refusal.value)
        return
    assert reason is None
    theirs = [unfused(model, whole_rows(model, side), advantages=ADVANTAGES_S) for side in ("right", "left")]
    patch_model(model)
    for expected in theirs:
        assert_same(patched(model, shared(), gft_advantages=ADVANTAGES_S), expected)


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 48}  # fmt: skip
ONLY_LONG_ROWS_DIFFER = [
    ("longest row of a call .longrope", "Phi3Config",
     {"rope_parameters": LONGROPE, "original_max_position_embeddings": 48}),
    ("longest row of a call .dynamic", "LlamaConfig",
     {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}),
    ("full attention .local", "GPTNeoConfig",
     {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "config", "options"), ONLY_LONG_ROWS_DIFFER)
def test_what_a_short_trial_cannot_see_is_refused_by_name(reason, config, options):
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**{**COMMON, **options}))
    assert shared_prompts.refusal_of_trial(model) is None
    with pytest.raises(ValueError, match=f"gft_prompt_ids must be left out, got a value; .*{reason}"):
        patch_model(model)(**shared())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_trial_tells_rounding_from_other_numbers_in_every_dtype(dtype):
    assert shared_prompts.refusal_of_trial(tiny("llama").to(dtype)) is None
    assert "computes other numbers" in shared_prompts.refusal_of_trial(tiny("mpt").to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert shared_prompts.refusal_of_trial(tiny("llama")) is None


def test_padding_behind_a_short_response_lies_within_the_table_of_positions():
    """A long prompt with a short response, beside a short one with a long response: 64 positions are enough."""
    model = patch_model(tiny("gpt2"))
    inputs, targets = shared_prompts.layout([([5] * 60, [[7, 8]]), ([6] * 2, [[9] * 30])], pad_id=0)
    log_probs = model(**inputs, shift_labels=targets, gft_return_stats=True).stats.log_probs
    row = torch.tensor([[5] * 60 + [7, 8]])
    alone = model(input_ids=row, labels=torch.where(torch.arange(62) < 60, -100, row), gft_return_stats=True).stats
    torch.testing.assert_close(log_probs[0, :2], alone.log_probs[0, 59:61])


def test_the_output_is_the_one_of_whole_rows():
    """Statistics per response token, no logits, and no cache that lacks the responses; from the logits as well."""
    whole, model = patch_model(tiny("llama")), patch_model(tiny("llama"), eval_logits=True)
    live = whole_rows(whole, "right")["labels"] != -100
    stats = whole(**whole_rows(whole, "right"), gft_return_stats=True).stats
    output = model(**shared(gft_return_stats=True))
    assert output.logits.shape == (*output.stats.log_probs.shape, VOCABULARY)
    assert output.get(shared_prompts.cache_name(model)) is None
    ours = output.stats.log_probs[shared()["shift_labels"] != -100]
    torch.testing.assert_close(ours, stats.log_probs[:, :-1][live[:, 1:]])
    assert model.train()(**shared()).logits is None


def broken(model, case):
    if case == "dropout":
        model.model.layers[1].self_attn.attention_dropout = 0.1
    if case == "gradient checkpointing":
        for layer in model.model.layers:
            layer.gradient_checkpointing = True
    if case == "the router's loss":
        model.config.output_router_logits = True
    return patch_model(model)


@pytest.mark.parametrize("case", ["dropout", "gradient checkpointing", "the router's loss"])
def test_a_step_that_would_be_another_is_refused_by_name(case):
    model = broken(tiny("mixtral"), case).train()
    with pytest.raises(ValueError, match=f"gft_prompt_ids must be left out, got a value; .*{case}"):
        model(**shared())
    assert case in shared_prompts.refusal_of_loss(model.eval(), training=True)
    if case != "the router's loss":
        assert model(**shared()).loss.isfinite()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"gft_prompt_ids": None}, "gft_prompt_ids must be given"),
        ({"gft_prompt_of": None}, "gft_prompt_of must be given"),
        ({"gft_prompt_of": torch.zeros(2, dtype=torch.int64)}, r"gft_prompt_of \(6,\) with gft_prompt_ids"),
        ({"attention_mask": None}, r"attention_mask must be \(6, 8\)"),
        ({"attention_mask": torch.ones(6, 4, dtype=torch.int64)}, r"got \(6, 4\)"),
        (
            {"attention_mask": shared()["attention_mask"][:, [3, 2, 1, 0, 4, 5, 6, 7]]},
            "gft_prompt_ids must be padded on the right, got an attention_mask that .* in row 4;",
        ),
        ({CACHE: transformers.DynamicCache()}, f"{CACHE} must be left out with gft_prompt_ids, got a value"),
        ({"shift_labels": None}, "labels must be given with gft_"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        patch_model(tiny("llama"))(**shared(**change))


def test_adapters_see_the_prompt_too():
    """LoRA on queries and values: its gradients come through the prompt's values as well."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(3))
    theirs = unfused(model, whole_rows(model, "right"), advantages=ADVANTAGES_S)
    assert_same(patched(patch_model(model), shared(), gft_advantages=ADVANTAGES_S), theirs)
