"""Text to token ids and back, one way for every source of responses.

A response is its tokens: what reward functions read is decoded from them, whoever wrote it, without the token that
ends it. A response to messages, or to a text that is messages rendered, ends in the token with which the chat template
closes an assistant's turn, one to another text in the tokenizer's end-of-text token; each of the two, and those that
the model's defaults name, end a sample.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gft_kernels.data.fields import plain

ANSWER = "an answer"  # what the template is shown to close
THINKING = r"[<\[](?:think|reason)\w*[>\]]"
OPENED = re.compile(rf"({THINKING})(\s*)$", re.IGNORECASE)
CLOSED = re.compile(THINKING.replace(r"[<\[]", r"[<\[]/") + r"\s*$", re.IGNORECASE)
TAIL = 8  # tokens of a prompt that hold such a mark and the white space behind it


def encode_prompt(
    tokenizer: Any, prompt: Any, tools: Sequence[Any] | None = None, chat_template_kwargs: Mapping | None = None
) -> list[int]:
    """Token ids of a prompt, with one beginning-of-text token at most and no end-of-text token of the tokenizer's.

    Messages go through the chat template, opened for the assistant's turn, or for going on with it where the last
    message is the assistant's. Raises: ValueError where the template refuses them.
    """
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
        if ids[-1:] == [tokenizer.eos_token_id]:
            own = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            if ids[-1 - len(own) : -1] == own:  # the last is the tokenizer's, and nobody goes on behind it
                ids.pop()
    else:
        text = _rendered(tokenizer, prompt, tools, dict(chat_template_kwargs or {}))
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    begin = tokenizer.bos_token_id
    return ids[1:] if begin is not None and ids[:2] == [begin, begin] else ids


def _rendered(tokenizer: Any, messages: Sequence[Mapping], tools: Any, variables: dict[str, Any]) -> str:
    template = _template(tokenizer)
    named = {"chat_template_kwargs": list(variables), "tools": ["tools"] if tools else []}
    for field, names in named.items():
        unread = [name for name in names if "{" in template and not re.search(rf"\b{re.escape(name)}\b", template)]
        if unread:
            raise ValueError(f"field `{field}` must be read by the chat template, got {unread[0]!r}, which it is not")
    goes_on = messages[-1]["role"] == "assistant"
    opening = {"add_generation_prompt": not goes_on, "continue_final_message": goes_on}
    try:
        return tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, **opening, **variables)
    except Exception as error:  # templates raise what they like, of classes of their own
        raise ValueError(
            f"field `prompt` must be messages that the chat template takes, got {type(error).__name__}: {error}"
        ) from None


def encode_response(tokenizer: Any, text: str, prompt: Any = "", prompt_ids: Sequence[int] = ()) -> list[int]:
    """Token ids of a complete response, closed once, so that the policy learns to stop.

    prompt: what it answers, text or messages; prompt_ids: the same, encoded. Where the prompt already opens the
    thinking (`<think>`), the response's own opening is left out: together they are what the policy would have written.
    """
    ids = list(tokenizer(_behind_the_opening(tokenizer, text, prompt_ids), add_special_tokens=False)["input_ids"])
    length = _length_without_end(tokenizer, ids)
    own = ids[length] if length < len(ids) and isinstance(prompt, str) else None
    return [*ids[:length], end_of_response(tokenizer, prompt) if own is None else own]


def _behind_the_opening(tokenizer: Any, text: str, prompt_ids: Sequence[int]) -> str:
    opened = OPENED.search(tokenizer.decode(list(prompt_ids)[-TAIL:]))
    if opened is None or not text.lstrip().startswith(opened[1]):
        return text
    return text.lstrip().removeprefix(opened[1]).removeprefix(opened[2])


def _length_without_end(tokenizer: Any, ids: Sequence[int]) -> int:
    """The number of ids before the end tokens, and white space among them, in which the ids end."""
    ends, length = end_tokens(tokenizer), len(ids)
    for place in range(len(ids) - 1, -1, -1):
        if ids[place] in ends:
            length = place
        elif tokenizer.decode([ids[place]]).strip():
            break
    return length


def decode(tokenizer: Any, ids: Sequence[int], ends: Sequence[int], skip_special_tokens: bool = False) -> str:
    """The text of a response as reward functions read it; `ends`: the tokens of which one may close it."""
    ids = list(ids[:-1] if ids and ids[-1] in ends else ids)
    return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


def end_of_response(tokenizer: Any, prompt: Any) -> int:
    """The token that closes a response to the prompt: messages, these rendered, or any other text.

    Raises: ValueError if there is none.
    """
    opening, turn_end = _turn(tokenizer, _template(tokenizer))
    in_turns = opening != "" and prompt.rstrip().endswith(opening) if isinstance(prompt, str) else True
    end = turn_end if in_turns and turn_end is not None else tokenizer.eos_token_id
    if end is None:
        raise ValueError("tokenizer must have an end-of-text token, got none; set its eos_token.")
    return end


def end_tokens(tokenizer: Any, generation_config: Any = None) -> tuple[int, ...]:
    """Every token that ends a response: the tokenizer's, the chat template's, and those the model's defaults name."""
    named = plain(getattr(generation_config, "eos_token_id", None))  # a number, a list, a tuple or a tensor
    several = named if isinstance(named, list) else [named]
    ends = [tokenizer.eos_token_id, _turn(tokenizer, _template(tokenizer))[1], *several]
    return tuple(dict.fromkeys(int(end) for end in ends if end is not None))


def _template(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None) or ""
    return "\n".join(template.values()) if isinstance(template, dict) else template


@functools.lru_cache(maxsize=16)
def _turn(tokenizer: Any, template: str) -> tuple[str, int | None]:
    """How the chat template opens an assistant's turn, and the token that closes it; "", None where it says neither.

    Both are read from rendered turns: what a template calls its end, and whether it is the tokenizer's, differs
    (Gemma's <end_of_turn>, Phi's <|end|>, ChatML's <|im_end|>, Llama 3's <|eot_id|>).
    """
    if "{" not in template:
        return "", None
    render = functools.partial(tokenizer.apply_chat_template, tokenize=False)
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": ANSWER}]
    try:
        closed, asked = render(turns), render(turns[:1])
        opened = render(turns[:1], add_generation_prompt=True)
    except Exception:  # a template of other roles: its turns end as texts do
        return "", None
    behind = closed.rpartition(ANSWER)[2] if ANSWER in closed else ""
    marks = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    marks -= {tokenizer.unk_token_id, tokenizer.pad_token_id} - {tokenizer.eos_token_id}
    end = next((i for i in tokenizer(behind, add_special_tokens=False)["input_ids"] if i in marks), None)
    return opened[len(os.path.commonprefix([opened, asked])) :].strip(), end  # noqa: RUF071 (characters are meant)


def doubts(tokenizer: Any, prompt_ids: Sequence[int], responses: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What about an encoded prompt is hardly meant: its kind, and a sentence about it."""
    end = _length_without_end(tokenizer, prompt_ids)
    if end < len(prompt_ids):
        mark = tokenizer.decode([prompt_ids[end]])
        yield "ended", f"field `prompt` should not end in an end token, got {mark!r}: nothing opens the response's turn"
    tail = tokenizer.decode(list(prompt_ids)[-TAIL:])
    opened = OPENED.search(tail)
    if opened and any(f"{opened[1][0]}/{opened[1][1:]}" not in text for text in responses):
        yield "unclosed", f"a response should close the {opened[1]} that its prompt opens, got one that does not"
    if CLOSED.search(tail) and any(re.match(rf"\s*{THINKING}", text, re.IGNORECASE) for text in responses):
        yield "reopened", "a response should not think again behind a prompt that has closed its thinking, got one"
