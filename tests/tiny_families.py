"""Causal language models of every kind of head, small enough for a test; each with the reason it is here.

Vocabulary 101 (a ragged width), hidden size 32, two layers. Weights are drawn wide enough for logits of size 1 and
more, so that a scale, a softcap or a bias that is dropped shows.
"""

from __future__ import annotations

import pytest
import torch
import transformers

VOCABULARY, HIDDEN = 101, 32
ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EMBEDDING_NAMES = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}

FAMILIES = {
    # name: (configuration class, options, reason)
    "llama": ("LlamaConfig", ATTENTION, "the plain case"),
    "llama-tied": ("LlamaConfig", {**ATTENTION, "tie_word_embeddings": True}, "head and embedding share one weight"),
    "mistral": ("MistralConfig", ATTENTION, "sliding window"),
    "mixtral": ("MixtralConfig", {**ATTENTION, **MOE}, "mixture of experts, no router loss"),
    "qwen2": ("Qwen2Config", ATTENTION, "biased attention"),
    "qwen2_moe": ("Qwen2MoeConfig", {**ATTENTION, **MOE, "shared_expert_intermediate_size": 16}, "shared expert"),
    "qwen3": ("Qwen3Config", ATTENTION, "normed queries"),
    "gemma": ("GemmaConfig", ATTENTION, "scaled embedding tied to the head"),
    "gemma2": ("Gemma2Config", {**ATTENTION, "final_logit_softcapping": 2.0}, "softcap of the logits"),
    "gemma3": ("Gemma3TextConfig", {**ATTENTION, "final_logit_softcapping": 2.0}, "softcap, off by default"),
    "recurrent_gemma": ("RecurrentGemmaConfig", {**ATTENTION, "lru_width": 32, "logits_soft_cap": 2.0},
                        "softcap under another name"),
    "phi": ("PhiConfig", {}, "bias in the head"),
    "phi3": ("Phi3Config", {"num_key_value_heads": 1}, "fused projections"),
    "cohere": ("CohereConfig", {"num_key_value_heads": 1, "logit_scale": 0.3}, "logits are multiplied"),
    "cohere2": ("Cohere2Config", {**ATTENTION, "logit_scale": 0.3}, "logits are multiplied, layers alternate"),
    "granite": ("GraniteConfig", {"num_key_value_heads": 1, "logits_scaling": 3.0}, "logits are divided"),
    "granitemoehybrid": ("GraniteMoeHybridConfig", {"num_key_value_heads": 1, "logits_scaling": 3.0, **MOE,
                         "shared_intermediate_size": 16, "mamba_n_heads": 4, "layer_types": ["full_attention"] * 2},
                         "divided, and use_cache is not a parameter of the forward"),
    "hyperclovax": ("HyperCLOVAXConfig", {**ATTENTION, "logits_scaling": 0.3}, "granite's name, but it multiplies"),
    "falcon_h1": ("FalconH1Config", {**ATTENTION, "lm_head_multiplier": 0.4, "mamba_d_ssm": 32, "mamba_n_heads": 4,
                  "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8},
                  "multiplied under another name; attention and state space"),
    "gpt2": ("GPT2Config", EMBEDDING_NAMES, "tied, absolute positions, base model called transformer"),
    "gptj": ("GPTJConfig", {**EMBEDDING_NAMES, "rotary_dim": 8}, "bias in the head, fp32 logits"),
    "gpt_neox": ("GPTNeoXConfig", {}, "the head is called embed_out"),
    "gpt_bigcode": ("GPTBigCodeConfig", EMBEDDING_NAMES, "multi-query attention"),
    "olmo": ("OlmoConfig", {"num_key_value_heads": 1}, "norms without weights"),
    "olmo2": ("Olmo2Config", {"num_key_value_heads": 1}, "norms after the layers"),
    "stablelm": ("StableLmConfig", {"num_key_value_heads": 1}, "partial rotary positions"),
    "starcoder2": ("Starcoder2Config", {"num_key_value_heads": 1}, "biased everywhere but in the head"),
    "falcon": ("FalconConfig", {}, "tied, parallel attention"),
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 16}, "hidden states are projected before the head"),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 2}, "alibi, tied"),
    "mpt": ("MptConfig", {"d_model": 32, "n_heads": 2, "n_layers": 2, "logit_scale": 0.5},
            "a logit_scale in the config that the model does not apply"),
    "nemotron": ("NemotronConfig", {"num_key_value_heads": 1}, "norms around one"),
    "ctrl": ("CTRLConfig", {"n_embd": 32, "n_layer": 2, "n_head": 2, "dff": 48}, "tied weight and a bias of its own"),
    "biogpt": ("BioGptConfig", {}, "the head is called output_projection"),
    "bert": ("BertConfig", {"is_decoder": True}, "the head is inside a prediction module, with layers before it"),
    "mamba": ("MambaConfig", {"state_size": 8}, "no attention"),
}  # fmt: skip


def tiny(name: str, seed: int = 0):
    """The family's model in eval mode; skips with the reason where this transformers cannot build it."""
    config_name, options, _reason = FAMILIES[name]
    config_class = getattr(transformers, config_name, None)
    if config_class is None:
        pytest.skip(f"transformers {transformers.__version__} has no {config_name}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = transformers.AutoModelForCausalLM.from_config(config_class(**{**COMMON, **options}))
        except Exception as error:  # another version's configuration may refuse in any way it likes
            pytest.skip(f"transformers {transformers.__version__} cannot build a tiny {name}: {error}")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.25)
    return model.eval()
