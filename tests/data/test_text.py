"""Prompts and responses as tokens, and responses as the text that rewards read, in the styles of chat models."""

from __future__ import annotations

import types

import chat_tokenizers as chat
import pytest
import torch
import trainer_rig as rig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gft_kernels.data import scratch, text
from gft_kernels.data.rows import Limits, Rows
from gft_kernels.trainer import GFTTrainer, RowError

ASKED = [{"role": "user", "content": "q"}]
STYLES = sorted(chat.STYLES)


def marks(tokenizer, ids) -> list[str]:
    return tokenizer.convert_ids_to_tokens(list(ids))


@pytest.mark.parametrize("stored", ["a x", "a x{end}", "a x{end}\n", "a x{end}\n{eos}"])
@pytest.mark.parametrize("style", STYLES)
def test_a_response_to_messages_ends_once_as_the_template_closes_a_turn(style, stored):
    tokenizer, of = chat.tokenizer(style), chat.STYLES[style]
    ids = text.encode_response(tokenizer, stored.format(end=of.end, eos=of.eos), ASKED)
    assert marks(tokenizer, ids) == ["a", " ", "x", of.end]
    assert text.decode(tokenizer, ids, text.end_tokens(tokenizer)) == "a x"


@pytest.mark.parametrize(("stored", "own"), [("a x", None), ("a x{eos} ", None), ("a x{end}\n", "end")])
@pytest.mark.parametrize("style", STYLES)
def test_a_response_to_text_ends_once_as_it_does_itself_or_the_tokenizer_says(style, stored, own):
    tokenizer, of = chat.tokenizer(style), chat.STYLES[style]
    ids = text.encode_response(tokenizer, stored.format(end=of.end, eos=of.eos))
    assert marks(tokenizer, ids) == ["a", " ", "x", of.end if own else of.eos]


@pytest.mark.parametrize("style", [style for style in STYLES if style not in ("mistral", "none")])
def test_a_prompt_that_is_rendered_already_is_answered_as_messages_are(style):
    tokenizer, of = chat.tokenizer(style), chat.STYLES[style]
    rendered = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, tokenize=False)
    assert text.encode_prompt(tokenizer, rendered) == text.encode_prompt(tokenizer, ASKED)
    assert marks(tokenizer, text.encode_response(tokenizer, "a x", rendered)) == ["a", " ", "x", of.end]


BEGUN = {"thinking": "<think>\n", "thought": "<think>\n\n</think>\n\n", "a beginning": "a "}


@pytest.mark.parametrize("begun", BEGUN.values(), ids=BEGUN)
@pytest.mark.parametrize("style", [style for style in STYLES if style != "none"])
def test_both_spellings_of_a_prompt_that_begins_the_answer_are_answered_alike(style, begun):
    tokenizer, of = chat.tokenizer(style), chat.STYLES[style]
    messages = [*ASKED, {"role": "assistant", "content": begun}]
    rendered = tokenizer.apply_chat_template(messages, continue_final_message=True, tokenize=False)
    found = [marks(tokenizer, text.encode_response(tokenizer, "x", prompt)) for prompt in (messages, rendered)]
    assert found == [["x", of.end]] * 2
    closed = tokenizer.apply_chat_template([*messages, *ASKED], tokenize=False)
    if style != "mistral":  # there a question's end is what opens the answer
        assert marks(tokenizer, text.encode_response(tokenizer, "x", closed))[-1] == of.eos


def turns(content: str = "m.content", before: str = "", opening: str = "<|im_start|>assistant\n") -> str:
    said = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ " + content + " }}<|im_end|>\n{% endfor %}"
    return before + said + "{% if add_generation_prompt %}" + opening + "{% endif %}"


UNUSUAL = {
    "needs a system message": turns(before="{% if messages[0].role != 'system' %}{{ raise_exception('') }}{% endif %}"),
    "reads parts": turns("m.content[0].text"),
    "refuses text": turns("m.content[0]['text'] + raise_exception('') if m.content is string else m.content[0].text"),
    "changes what is said": turns("m.content | upper"),
    "opens nothing": turns(opening=""),
    "thinks unless told not to": turns(
        opening="<|im_start|>assistant\n{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}"
    ),
    "thinks if told to": turns(
        opening="<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    ),
}


@pytest.mark.parametrize("pad", ["<|endoftext|>", "<|im_end|>"])
@pytest.mark.parametrize("template", UNUSUAL.values(), ids=UNUSUAL)
def test_the_end_of_an_unusual_templates_turn_is_found(template, pad):
    tokenizer = chat.tokenizer("qwen base")
    tokenizer.chat_template, tokenizer.pad_token = template, pad
    assert tokenizer.convert_ids_to_tokens(text.end_tokens(tokenizer)) == ["<|endoftext|>", "<|im_end|>"]
    asked = [{"role": "system", "content": "z"}, {"role": "user", "content": "q"}]
    for variables in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
        given = {name: value for name, value in variables.items() if name in template}
        ids = text.encode_prompt(tokenizer, asked, None, given)
        rendered = tokenizer.decode(ids)
        assert "user\n<|im_end|>" not in rendered
        for prompt in (asked, rendered, rendered.rstrip(), rendered + "a "):
            assert marks(tokenizer, text.encode_response(tokenizer, "x", prompt))[-1] == "<|im_end|>"
        assert marks(tokenizer, text.encode_response(tokenizer, "x", "q"))[-1] == "<|endoftext|>"


@pytest.mark.parametrize("special", [False, True])
def test_line_breaks_and_added_words_end_nothing(special):
    tokenizer = chat.tokenizer("none")
    tokenizer.add_tokens(["\n"], special_tokens=special)
    tokenizer.add_tokens([":", "user"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n:user' }}{% endfor %}"
    assert marks(tokenizer, text.end_tokens(tokenizer)) == ["<eos>"]
    assert marks(tokenizer, text.encode_response(tokenizer, "a\nx:\n", ASKED)) == [*"a\nx:\n", "<eos>"]


def test_a_template_that_renders_no_conversation_is_named_once():
    tokenizer = chat.tokenizer("qwen base")
    tokenizer.chat_template = "{{ raise_exception('say please') }}"
    told = r"the chat template should render .*, got TemplateError: say please; .* '<\|endo"
    with pytest.warns(UserWarning, match=told):
        assert marks(tokenizer, text.encode_response(tokenizer, "x", ASKED)) == ["x", "<|endoftext|>"]
    assert marks(tokenizer, text.encode_response(tokenizer, "x", ASKED)) == ["x", "<|endoftext|>"]


@pytest.mark.parametrize(
    ("named", "others"), [(None, []), (5, [5]), ([5, 6], [5, 6]), ((5, 6), [5, 6]), (torch.tensor([5, 6]), [5, 6])]
)
@pytest.mark.parametrize("style", STYLES)
def test_samples_end_where_demonstrations_do(style, named, others):
    tokenizer, of = chat.tokenizer(style), chat.STYLES[style]
    model = types.SimpleNamespace(generation_config=types.SimpleNamespace(eos_token_id=named))
    wanted = {*tokenizer.convert_tokens_to_ids([of.eos, of.end]), *others}
    assert set(text.end_tokens(tokenizer, model.generation_config)) == wanted


def test_equal_tokens_are_equal_text_for_every_source(tmp_path):
    """The samples are the demonstration, token for token: no reward may tell them apart."""
    tokenizer, seen = chat.tokenizer("gemma"), []
    model = scratch.small_llama(tokenizer, width=32, layers=1, heads=2, context=64)
    said = "<think>x</think><start_of_turn>a <end_of_turn>\n"
    rows = [{"prompt": ASKED, "demonstrations": [said, "x"]}] * 2

    def format_reward(prompts, completions, **columns):
        seen.extend(completions)
        return [float("<start_of_turn>" in c) for c in completions]

    def repeat(model, prompts_ids, sampling):
        ids = text.encode_response(tokenizer, said, ASKED)
        assert tokenizer.convert_tokens_to_ids("<end_of_turn>") in sampling.eos_ids
        return [ids] * (len(prompts_ids) * sampling.num_generations)

    for skip, wanted in ((False, "<think>x</think><start_of_turn>a "), (True, "<think>x</think>a ")):
        args = rig.config(tmp_path, max_steps=1, max_completion_length=16, skip_special_tokens=skip)
        GFTTrainer(model, args, rows, None, tokenizer, reward_funcs=format_reward, rollout_fn=repeat).train()
        assert [c for c in seen if c != "x"] == [wanted] * 6  # an expert and two samples in each of two groups
        seen.clear()


def prompt(style, record, **options):
    tokenizer = chat.tokenizer(style, **options)
    fields = (record.get("tools"), record.get("chat_template_kwargs"))
    return tokenizer.decode(text.encode_prompt(tokenizer, record["prompt"], *fields))


OPENED = "<|im_start|>user\nq<|im_end|>\n{}<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("style", "record", "wanted"),
    [("qwen", {"prompt": ASKED}, OPENED.format("")),
     ("qwen", {"prompt": ASKED, "tools": [{"name": "z"}]}, OPENED.format("tools:z")),
     ("qwen", {"prompt": ASKED, "chat_template_kwargs": {"enable_thinking": False}}, OPENED.format("<think></think>")),
     ("qwen", {"prompt": [*ASKED, {"role": "assistant", "content": "a"}]}, OPENED.format("") + "a"),
     ("llama 3", {"prompt": "q"}, "<|begin_of_text|>q"),
     ("llama 3", {"prompt": "<|begin_of_text|>q"}, "<|begin_of_text|>q")],
)  # fmt: skip
def test_a_prompt_is_what_the_user_sees(style, record, wanted):
    assert prompt(style, record) == wanted


def test_a_tokenizer_that_closes_texts_does_not_close_a_prompt():
    assert prompt("llama 3", {"prompt": "q"}, closes=True) == "<|begin_of_text|>q"
    assert prompt("none", {"prompt": "q<eos>"}, closes=True) == "q<eos>"


def test_a_response_does_not_open_the_thinking_a_second_time():
    tokenizer = chat.tokenizer("qwen thinking")
    ids = text.encode_prompt(tokenizer, ASKED)
    assert marks(tokenizer, text.encode_response(tokenizer, "<think>", ASKED, ids)) == ["<|im_end|>"]
    for own in ("<think>\nx</think>a", "\n<think>x</think>a", "x</think>a"):
        whole = tokenizer.decode([*ids, *text.encode_response(tokenizer, own, ASKED, ids)])
        assert whole.endswith("assistant\n<think>\nx</think>a<|im_end|>"), own
    assert marks(tokenizer, text.encode_response(tokenizer, "<think>", "q"))[0] == "<think>"


@pytest.mark.parametrize(
    ("prompt", "response", "wanted"),
    [
        ("x\n", "a", ["a"]),
        ("x ", "a", ["a"]),
        ("x\n", " a", ["\u2581a"]),
        ("x:", "a", ["\u2581a"]),
        ("x\n", "\na", ["\n", "a"]),
    ],
)
@pytest.mark.parametrize("scheme", ["first", "always"])
def test_sentencepiece_puts_no_second_white_space_before_a_response(scheme, prompt, response, wanted):
    vocabulary = {token: i for i, token in enumerate(["</s>", "\u2581", *"\nax:", "\u2581a"])}
    inner = Tokenizer(models.BPE(vocabulary, [("\u2581", "a")]))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    inner.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    ids = text.encode_prompt(tokenizer, prompt)
    assert marks(tokenizer, text.encode_response(tokenizer, response, prompt, ids)) == [*wanted, "</s>"]


def rows(style, records, limits=None, name="rows", **options):
    plain = {"num_demonstrations": 1, "num_generations": 0, "overlong": "error", "max_prompt_length": None}
    plain |= {"max_completion_length": 64, "skip_special_tokens": False}
    tokenizer = chat.tokenizer(style) if isinstance(style, str) else style
    return Rows(records, name, tokenizer, types.SimpleNamespace(**{**plain, **options}), limits or Limits())


THOUGHT_TWICE = {"prompt": "q<think></think>", "demonstrations": ["<think>x</think>a"]}


@pytest.mark.parametrize(
    ("style", "record", "warning"),
    [("qwen", {"prompt": "q<|im_end|>\n"}, r"field `prompt` should not end in an end token, got '<\|im_end"),
     ("qwen thinking", {"prompt": ASKED}, r"a response should close the <think> that its prompt opens"),
     ("qwen", THOUGHT_TWICE, r"a response should not think again"),
     ("gpt-oss", {"prompt": ASKED}, r"a response should begin with '<\|channel\|>', as the chat template's answers do"),
     ("qwen", {"demonstrations": ["a<|im_end|>\n<|im_start|>user\nq<|im_end|>"]}, "a response should end at its first"),
     (rig.tokenizer(), {"demonstrations": ["\N{ROCKET}a"]}, "text should be known to the tokenizer, got some")],
)  # fmt: skip
def test_prompts_that_are_hardly_meant_are_named_once(style, record, warning):
    sound = {"prompt": "a", "demonstrations": ["a"]}
    with pytest.warns(UserWarning, match=rf"rows\[1\]: {warning}") as found:
        rows(style, [sound, {**sound, **record}, {**sound, **record}])
    assert len(found) == 1


def test_a_response_that_begins_as_the_template_has_it_is_no_doubt(recwarn):
    records = [{"prompt": ASKED, "demonstrations": ["<|channel|>z<|message|>x"]}]
    records.append({"prompt": [*ASKED, {"role": "assistant", "content": "a"}], "demonstrations": ["x"]})
    assert len(rows("gpt-oss", records)) == 2 and not list(recwarn)


READ_BY = "must be read by the chat template"


@pytest.mark.parametrize(
    ("style", "record", "message"),
    [("gemma", {"prompt": [{"role": "system", "content": "q"}, *ASKED]}, "that the chat template takes, got Templ"),
     ("gemma", {"prompt": ASKED, "tools": [{"name": "z"}]}, f"field `tools` {READ_BY}"),
     ("qwen", {"prompt": ASKED, "chat_template_kwargs": {"enable_thinkin": False}}, f"{READ_BY}, got 'enable_thinkin'"),
     ("qwen", {"prompt": ASKED, "tools": "z"}, "field `tools` must be a list of descriptions of functions, got str"),
     ("qwen", {"prompt": "q", "tools": [{"name": "z"}]}, "field `tools` must be absent where `prompt` is text"),
     ("qwen", {"prompt": ASKED, "chat_template_kwargs": [1]}, "must name variables of the chat template, got list")],
)  # fmt: skip
def test_prompts_that_cannot_be_rendered_are_refused(style, record, message):
    with pytest.raises(RowError, match=rf"rows\[0\]: .*{message}"):
        rows(style, [{"demonstrations": ["a"], **record}])


def test_a_prompt_has_a_token():
    class Silent:
        eos_token_id, bos_token_id, chat_template = 1, None, None

        def __call__(self, text, **options):
            return {"input_ids": [] if text == "q" else [2]}

        def decode(self, ids, **options):
            return "-" * len(ids)

    with pytest.raises(RowError, match=r"rows\[1\]: field `prompt` must have a token, got none of 'q'"):
        rows(Silent(), [{"prompt": "u", "demonstrations": ["a"]}, {"prompt": "q", "demonstrations": ["a"]}])


@pytest.mark.parametrize(
    ("content", "words"),
    [("a x", ["a", " ", "x", "<|im_end|>"]), ("a x y z", ["a", " ", "x", " "]), ("a x y", ["a", " ", "x", " "])],
)
def test_a_long_demonstration_may_be_cut_and_is_read_as_cut(content, words):
    tokenizer = chat.tokenizer("qwen base")
    cut = {"overlong": "truncate", "max_completion_length": 4}
    [row] = rows("qwen base", [{"prompt": ASKED, "demonstrations": [content]}], **cut)
    assert marks(tokenizer, row.given[0].ids) == words
    assert row.given[0].text == "".join(words[:-1] if words[-1] == "<|im_end|>" else words)


def test_cutting_has_its_limits():
    with pytest.raises(ValueError, match="overlong must be 'error' or 'drop' where rows bring `rewards`"):
        rows("qwen", [{"prompt": "q", "responses": ["a"], "rewards": [1.0]}], overlong="truncate")
    records = [{"prompt": "q u q", "demonstrations": ["a x y z"]}, {"prompt": "q", "demonstrations": ["a x y z"]}]
    how = {"name": "train_dataset", "overlong": "truncate", "max_prompt_length": 4}
    kept = rows("qwen", records, Limits(context=4), **how)
    assert kept.kept == [1] and len(kept[0].given[0].ids) == 3  # a long prompt is left out; one token of four is taken
    with pytest.raises(RowError, match=r"token ids must be below 7, the rows of the model's embedding, got \d+; res"):
        rows("qwen", records, Limits(vocabulary=7))
