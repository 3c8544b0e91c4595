"""Text to token ids and back, one way for every source of responses.

A response is its tokens: what reward functions read is decoded from them, whoever wrote it, without the token that
ends it. A response to messages, or to a text that is messages rendered, ends in the token with which the chat template
closes an assistant's turn, one to another text in the tokenizer's end-of-text token; each of the two, and those that
the model's defaults name, end a sample.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gft_kernels.data.fields import plain

QUESTIONS, ANSWERS = ("a question", "some words"), ("an answer", "its reply")  # what the template is shown; in no
# spelling (capitals, trimmed) do the two of a pair begin or end alike
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
            own = _ids(tokenizer, prompt)
            if ids[-1 - len(own) : -1] == own:  # the last is the tokenizer's, and nobody goes on behind it
                ids.pop()
    else:
        text = _rendered(tokenizer, prompt, tools, dict(chat_template_kwargs or {}))
        ids = _ids(tokenizer, text)
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
    spelled = _spelled(messages, _turn(tokenizer, template).in_parts)
    try:
        return tokenizer.apply_chat_template(spelled, tools=tools, tokenize=False, **opening, **variables)
    except Exception as error:  # templates raise what they like, of classes of their own
        raise ValueError(
            f"field `prompt` must be messages that the chat template takes, got {type(error).__name__}: {error}"
        ) from None


def encode_response(tokenizer: Any, text: str, prompt: Any = "", prompt_ids: Sequence[int] = ()) -> list[int]:
    """Token ids of a complete response, closed once, so that the policy learns to stop.

    prompt: what it answers, text or messages; prompt_ids: the same, encoded. Where the prompt already opens the
    thinking (`<think>`), the response's own opening is left out: together they are what the policy would have written.
    """
    tail = tokenizer.decode(list(prompt_ids)[-TAIL:])
    ids = _ids_behind(tokenizer, tail, _behind_the_opening(tail, text))
    length = _length_without_end(tokenizer, ids)
    own = ids[length] if length < len(ids) and isinstance(prompt, str) else None
    return [*ids[:length], end_of_response(tokenizer, prompt) if own is None else own]


def _ids_behind(tokenizer: Any, tail: str, text: str) -> list[int]:
    """Token ids of a text; behind white space without the space that SentencePiece puts before every text."""
    spaced = tail[-1:].isspace() and _puts_a_space(tokenizer)
    return _behind_a_line(tokenizer, text) if spaced else _ids(tokenizer, text)


@functools.lru_cache(maxsize=16)
def _puts_a_space(tokenizer: Any) -> bool:
    return _behind_a_line(tokenizer, "a") != _ids(tokenizer, "a")


def _behind_a_line(tokenizer: Any, text: str) -> list[int]:
    line, both = _ids(tokenizer, "\n"), _ids(tokenizer, f"\n{text}")
    return both[len(line) :] if both[: len(line)] == line else _ids(tokenizer, text)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _behind_the_opening(tail: str, text: str) -> str:
    opened = OPENED.search(tail)
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
    turn = _turn(tokenizer, _template(tokenizer))
    in_turns = _opens_a_turn(tokenizer, prompt, turn) if isinstance(prompt, str) else True
    end = turn.end if in_turns and turn.end is not None else tokenizer.eos_token_id
    if end is None:
        raise ValueError("tokenizer must have an end-of-text token, got none; set its eos_token.")
    return end


def _opens_a_turn(tokenizer: Any, prompt: str, turn: Turn) -> bool:
    """Whether the text's last opening of an assistant's turn is not closed; thinking or a beginning may follow it."""
    _, opening, behind = prompt.rpartition(turn.opening) if turn.opening else ("", "", "")
    return opening != "" and (turn.end is None or tokenizer.decode([turn.end]) not in behind)


def end_tokens(tokenizer: Any, generation_config: Any = None) -> tuple[int, ...]:
    """Every token that ends a response: the tokenizer's, the chat template's, and those the model's defaults name."""
    named = plain(getattr(generation_config, "eos_token_id", None))  # a number, a list, a tuple or a tensor
    several = named if isinstance(named, list) else [named]
    ends = [tokenizer.eos_token_id, _turn(tokenizer, _template(tokenizer)).end, *several]
    return tuple(dict.fromkeys(int(end) for end in ends if end is not None))


def _template(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None) or ""
    return "\n".join(template.values()) if isinstance(template, dict) else template


class Turn(NamedTuple):
    """How a chat template writes an assistant's turn."""

    opening: str = ""  # without the thinking; where the template opens none, what it puts behind a question
    end: int | None = None  # the token that closes the turn; None: none of its own
    in_parts: bool = False  # whether it reads content as a list of parts, [{"type": "text", "text": ...}]
    lead: int | None = None  # the first special token between the opening and an answer (gpt-oss names a channel)


@functools.lru_cache(maxsize=16)
def _turn(tokenizer: Any, template: str) -> Turn:
    """Read from rendered turns: what a template calls its end, and whether it is the tokenizer's, differs.

    (Gemma's <end_of_turn>, Phi's <|end|>, ChatML's <|im_end|>, Llama 3's <|eot_id|>.) What stands around an answer is
    what two answers have in common: a template may change the answers themselves.
    Warns: where no conversation that it takes is found.
    """
    if "{" not in template:
        return Turn()
    faults = []
    for in_parts, system in itertools.product((False, True), repeat=2):
        show = functools.partial(_shown, tokenizer, in_parts, system)
        try:
            closed = [show(QUESTIONS[0], answer) for answer in ANSWERS]
            asked = [show(question) for question in QUESTIONS]
            opened = show(QUESTIONS[0], add_generation_prompt=True)
        except Exception as error:  # templates raise what they like, of classes of their own
            faults.append(f"{type(error).__name__}: {error}")
            continue
        if closed[0] != closed[1]:
            question, begun = _common([opened, asked[0]]), _common(closed)
            opening = re.split(THINKING, opened[len(question) :], maxsplit=1, flags=re.IGNORECASE)[0]
            opening = opening.strip() or _common_end(asked).strip()
            lead = begun[len(_common([begun, opened])) :] if begun.startswith(question) else ""
            end = _first_mark(tokenizer, _common_end(closed))
            return Turn(opening, end, in_parts, _first_mark(tokenizer, lead))
        faults.append("turns without what is said in them")
    warnings.warn(
        f"the chat template should render a question and its answer, got {faults[0]}; responses to messages end in "
        f"{tokenizer.eos_token!r}, the tokenizer's end-of-text token, whatever ends a turn of the template's.",
        stacklevel=2,
    )
    return Turn()


def _shown(tokenizer: Any, in_parts: bool, system: bool, question: str, answer: str | None = None, **opening) -> str:
    said = {"system": "a rule" if system else None, "user": question, "assistant": answer}
    messages = [{"role": role, "content": content} for role, content in said.items() if content is not None]
    return tokenizer.apply_chat_template(_spelled(messages, in_parts), tokenize=False, **opening)


def _spelled(messages: Iterable[Mapping], in_parts: bool) -> list[Mapping]:
    """The messages with content as the template reads it."""
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} if in_parts else m for m in messages]


def _common(texts: Sequence[str]) -> str:
    return os.path.commonprefix(texts)  # noqa: RUF071 (characters are meant)


def _common_end(texts: Sequence[str]) -> str:
    return _common([text[::-1] for text in texts])[::-1]


def _first_mark(tokenizer: Any, text: str) -> int | None:
    """The first token of the text that is special: other added tokens (line breaks, names) are parts of answers too."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    marks = {*tokenizer.all_special_ids, *added} - ({tokenizer.unk_token_id} - {tokenizer.eos_token_id})
    ids = _ids(tokenizer, text)
    return next((i for i in ids if i in marks and tokenizer.decode([i]).strip()), None)


def doubts(
    tokenizer: Any, prompt_ids: Sequence[int], responses: Sequence[str], encoded: Sequence[Sequence[int]]
) -> Iterator[tuple[str, str]]:
    """What about an encoded prompt and its responses is hardly meant: its kind, and a sentence about it."""
    unknown = getattr(tokenizer, "unk_token_id", None)  # GPT-2's ends texts, and is never used for this
    if unknown != tokenizer.eos_token_id and any(unknown in ids for ids in (prompt_ids, *encoded)):
        mark = tokenizer.decode([unknown])
        yield "unknown", f"text should be known to the tokenizer, got some that it reads as {mark!r}"
    early = next((end for end in end_tokens(tokenizer) for ids in encoded if end in ids[:-1]), None)
    if early is not None:
        mark = tokenizer.decode([early])
        yield "early", f"a response should end at its first end token, as samples do, got one with {mark!r} inside"
    end = _length_without_end(tokenizer, prompt_ids)
    if end < len(prompt_ids):
        mark = tokenizer.decode([prompt_ids[end]])
        yield "ended", f"field `prompt` should not end in an end token, got {mark!r}: nothing opens the response's turn"
    tail, turn = tokenizer.decode(list(prompt_ids)[-TAIL:]), _turn(tokenizer, _template(tokenizer))
    if turn.lead is not None and tail.rstrip().endswith(turn.opening) and any(turn.lead not in ids for ids in encoded):
        mark = tokenizer.decode([turn.lead])
        yield "bare", f"a response should begin with {mark!r}, as the chat template's answers do, got one without it"
    opened = OPENED.search(tail)
    if opened and any(f"{opened[1][0]}/{opened[1][1:]}" not in text for text in responses):
        yield "unclosed", f"a response should close the {opened[1]} that its prompt opens, got one that does not"
    if CLOSED.search(tail) and any(re.match(rf"\s*{THINKING}", text, re.IGNORECASE) for text in responses):
        yield "reopened", "a response should not think again behind a prompt that has closed its thinking, got one"
