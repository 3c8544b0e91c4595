"""Small causal language models with weights and tokenizer from scratch: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"


def character_tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """One token per character of the alphabet; any other character is read as padding, which rows are warned of."""
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=PAD)


def byte_pair_tokenizer(texts: Iterable[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """A byte-level byte-pair tokenizer fitted to the texts; digits stay single tokens."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)


def small_llama(tokenizer, width: int, layers: int, heads: int, context: int, seed: int = 0) -> LlamaForCausalLM:
    """A Llama of the given size with random weights."""
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        **_of_the_tokenizer(tokenizer),
    )
    return _random(LlamaForCausalLM, config, seed)


def small_gpt2(
    tokenizer, width: int, layers: int, heads: int, context: int, seed: int = 0, dropout: float = 0.0, **options: Any
) -> GPT2LMHeadModel:
    """A GPT-2 with random weights; its absolute positions suit prompts of a fixed form. options: of GPT2Config."""
    config = GPT2Config(
        n_positions=context,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        # GPT-2's own function as one operator instead of eight
        **{"activation_function": "gelu_pytorch_tanh", **_of_the_tokenizer(tokenizer), **options},
    )
    return _random(GPT2LMHeadModel, config, seed)


def _of_the_tokenizer(tokenizer) -> dict[str, Any]:
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return {"vocab_size": len(tokenizer), "initializer_range": 0.05, **ends}


def _random(kind: type, config: Any, seed: int) -> Any:
    """The model with weights that depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config)
