"""Writes docs/api.md, the reference of the public names, from their signatures and docstrings.

    python docs/generate_api.py

tests/project/test_site.py fails when the page is not what this writes.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from pathlib import Path

import gft_kernels
from gft_kernels import arguments

PAGE = Path(__file__).parent / "api.md"
LOSSES = ("gft_loss", "gft_linear_loss", "policy_loss", "group_advantages", "importance_weights", "token_log_probs")
MODULES = ("GFTLoss", "GFTLinearLoss")
SECTIONS = ("Args", "Returns", "Raises", "Source")

HEAD = """<!-- Written by docs/generate_api.py; edit the docstrings instead. -->

# Reference

Everything here is imported from `gft_kernels`. The trainer has [its own page](training.md). F1 to F7 are the formulas
of [the mathematics](formulas.md); a row is one token position.
"""


def page() -> str:
    """The whole page. Every name in `gft_kernels.__all__` is on it."""
    others = [name for name in gft_kernels.__all__ if name not in LOSSES + MODULES]
    losses = [entry(name) for name in (*LOSSES, *MODULES)]
    return "\n".join([HEAD, *losses, options(), *(entry(name) for name in others)])


def options() -> str:
    """Every option of the losses, once."""
    lines = [
        "## Options",
        "",
        "By keyword, where a signature lists them, with the default shown there.",
        "",
    ]
    for name, (kind, option) in arguments.meanings(arguments.PolicyOptions).items():
        text = f"- `{name}` ({plain(kind)}): {option.meaning}"
        lines.append(textwrap.fill(text, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))
    return linked("\n".join([*lines, ""]))


def plain(annotation: object) -> str:
    """A type as a signature writes it."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return text.replace("torch.Tensor", "Tensor").replace(".distributed_c10d.", ".").removeprefix("Unpack[").rstrip("]")


def shown(default: object) -> str:
    """A default as a signature writes it, strings in double quotes."""
    return f'"{default}"' if isinstance(default, str) else repr(default)


def entry(name: str) -> str:
    """One public name: heading, signature, docstring."""
    thing = getattr(gft_kernels, name)
    parts = [f"## {name}", ""]
    if not (inspect.isclass(thing) and issubclass(thing, Exception)):
        parts += ["```text", signature(name, thing), "```", ""]
    described = (inspect.getdoc(thing) or "").split("\n\nOptions:\n")
    options = ["", "**Options** below."] if len(described) > 1 else []
    return "\n".join([*parts, markdown(described[0]), *options, ""])


def signature(name: str, thing: object) -> str:
    """The signature on one line if it fits, else one parameter a line."""
    if dataclasses.is_dataclass(thing):
        columns = [f"    {field.name}: {field.type}" for field in dataclasses.fields(thing)]
        return "\n".join([f"class {name}:", *columns])
    found = inspect.signature(thing)  # type: ignore[arg-type]
    prefix = f"class {name}" if inspect.isclass(thing) else name
    arguments, starred = [], False
    for parameter in found.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            arguments.append("*")
            starred = True
        arguments.append(argument(parameter))
    after = "" if inspect.isclass(thing) else f" -> {found.return_annotation}"
    line = f"{prefix}({', '.join(arguments)}){after}"
    if len(line) <= 110:
        return line
    return "\n".join([f"{prefix}(", *(f"    {each}," for each in arguments), f"){after}"])


def argument(parameter: inspect.Parameter) -> str:
    """`name: type = default`, strings in double quotes."""
    text = parameter.name if parameter.kind is not parameter.VAR_KEYWORD else f"**{parameter.name}"
    if parameter.annotation is not parameter.empty:
        text += f": {plain(parameter.annotation)}"
    if parameter.default is not parameter.empty:
        text += f" = {shown(parameter.default)}"
    return text


def markdown(docstring: str) -> str:
    """A docstring as Markdown: paragraphs stay, the entries of a section become a list."""
    section, lines = "", []
    for line in docstring.splitlines():
        heading = re.fullmatch(rf"({'|'.join(SECTIONS)}):(.*)", line)
        if heading:
            section = heading[1]
            lines += ["", f"**{section}.**{heading[2]}", *([""] if not heading[2] else [])]
        elif section and re.match(r" {4}\S", line):
            lines.append(item(line.strip()) if section != "Returns" else line.strip())
        elif section and line.strip():
            lines.append(f"  {line.strip()}" if line.startswith(" ") else line)
        else:
            lines.append(line)
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    return linked(text)


def linked(text: str) -> str:
    """Names of pages as links."""
    return re.sub(r"docs/(\w+\.md(?:#\w+)?)", r"[\1](\1)", text)


def item(line: str) -> str:
    """`name: text` as a list entry; names may be several, and a line without a name stays a sentence."""
    named = re.match(r"(\w+(?:, \w+)*): (.*)", line)
    if named is None:
        return f"- {line}"
    names = ", ".join(f"`{name.strip()}`" for name in named[1].split(","))
    return f"- {names}: {named[2]}"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
