"""Word-level tokenizers in the styles of chat models: their special tokens, and templates cut to what differs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gft_kernels.data import extract_json, scratch

WORDS = [*"uqaxyz:", "<think>", "</think>", "user", "model", "assistant", "system", "tools", " ", "\n"]


@dataclass(frozen=True)
class Style:
    """What differs between chat models; `end` closes an assistant's turn, `eos` is the tokenizer's own token."""

    template: str
    eos: str
    end: str
    special: tuple[str, ...] = ()
    begin: str | None = None
    pad: str | None = None


def chatml(thinking: str = "", variables: str = "") -> str:
    turns = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    opening = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n" + thinking + "' }}{% endif %}"
    return turns + variables + opening


GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ '<start_of_turn>' + "
    "('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + "
    "m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
CHANNELS = (
    "{% for m in messages %}{{ '<|start|>' + m.role + ('<|channel|>z' if m.role == 'assistant' else '') + "
    "'<|message|>' + m.content + ('<|return|>' if m.role == 'assistant' and loop.last else '<|end|>') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
ENABLE = "{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}"
TOOLS = "{% if tools %}{{ 'tools:' + tools[0].name }}{% endif %}"
STYLES = {
    "gemma": Style(GEMMA, "<eos>", "<end_of_turn>", ("<start_of_turn>",), "<bos>", "<pad>"),
    "phi": Style(PHI, "<|endoftext|>", "<|end|>", ("<|user|>", "<|assistant|>"), None, "<|endoftext|>"),
    "qwen base": Style(chatml(), "<|endoftext|>", "<|im_end|>", ("<|im_start|>",), None, "<|endoftext|>"),
    "qwen": Style(chatml("", TOOLS + ENABLE), "<|im_end|>", "<|im_end|>", ("<|im_start|>", "<|endoftext|>")),
    "qwen thinking": Style(chatml("<think>\\n"), "<|im_end|>", "<|im_end|>", ("<|im_start|>",)),
    "llama 3": Style(
        LLAMA, "<|end_of_text|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>"), "<|begin_of_text|>"
    ),
    "mistral": Style(MISTRAL, "</s>", "</s>", ("[INST]", "[/INST]"), "<s>", "<unk>"),
    "gpt-oss": Style(CHANNELS, "<|return|>", "<|return|>", ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")),
    "none": Style("{% for m in messages %}{{ m.content + ':' }}{% endfor %}", "<eos>", "<eos>"),
}


def tokenizer(style: str = "none", closes: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer of a style; a text gets its beginning token and, with `closes`, its end-of-text token."""
    of = STYLES[style]
    marks = list(dict.fromkeys(t for t in (of.begin, of.eos, of.end, *of.special, of.pad, "<unk>") if t))
    vocabulary = {token: i for i, token in enumerate([*marks, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"</?think>|\w+|\s|."), "isolated")
    inner.decoder = decoders.Fuse()
    before, behind = f"{of.begin} " if of.begin else "", f" {of.eos}" if closes else ""
    named = [(token, vocabulary[token]) for token in (of.begin, of.eos) if token]
    inner.post_processor = processors.TemplateProcessing(single=f"{before}$A{behind}", special_tokens=named)
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token=of.eos, bos_token=of.begin, pad_token=of.pad
    )
    made.add_special_tokens({"additional_special_tokens": [*of.special, of.end]})
    made.chat_template = of.template
    return made


def model_folder(folder: Path) -> str:
    """A folder with a model of random weights that reads the texts of the extraction task in turns, and writes any."""
    rows = extract_json.read_rows()
    texts = [text for row in rows for text in (row["prompt"][-1]["content"], *row["demonstrations"])]
    made = scratch.byte_pair_tokenizer(texts, vocabulary_size=400)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = chatml()
    scratch.small_llama(made, width=32, layers=1, heads=2, context=256).save_pretrained(folder / "tiny")
    made.save_pretrained(folder / "tiny")
    return str(folder / "tiny")
