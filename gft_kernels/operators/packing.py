"""A call as the arguments of a torch operator and back; the operator's schema follows from the call's fields."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from gft_kernels.options import Credit, Objective, Rule

KINDS = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "int": "SymInt",  # a length written "int" would compile a new graph for every value
    "float": "float",
    "str": "str",
    "bool": "bool",
    "torch.dtype": "ScalarType",
    "torch.dtype | None": "ScalarType?",
}
WITHIN = {"credit": Credit, "objective": Objective, "given": Rule}  # by the name of the field that holds it
GIVEN = "given_"  # before the names of the fields of an objective's second rule


class Packing:
    """Of one kind of call: its fields in order, those of its parts in their place, and the backend last."""

    def __init__(self, call: type):
        self.call = call
        places = list(self._places("call", call))
        self.places = tuple((part, name) for part, name, _ in places)
        named = [f"{kind} {GIVEN if part == 'given' else ''}{name}" for part, name, kind in places]
        self.schema = ", ".join([*named, "str backend"])

    def _places(self, part: str, kind: type) -> Iterator[tuple[str, str, str]]:
        """(part, field, kind in the schema) of a dataclass and of what it holds."""
        for field in fields(kind):
            if field.name in WITHIN:
                yield from self._places(field.name, WITHIN[field.name])
            else:
                yield part, field.name, KINDS[str(field.type)]

    def pack(self, call: Any, backend: str) -> tuple:
        parts = {"call": call, "credit": call.credit, "objective": call.objective, "given": call.objective.given}
        return (*(getattr(parts[part], name) for part, name in self.places), backend)

    def unpack(self, arguments: Sequence) -> tuple[Any, str]:
        found: dict[str, dict[str, Any]] = {part: {} for part in ("call", *WITHIN)}
        for (part, name), value in zip(self.places, arguments[:-1], strict=True):
            found[part][name] = value
        objective = Objective(**found["objective"], given=Rule(**found["given"]))
        return self.call(**found["call"], credit=Credit(**found["credit"]), objective=objective), arguments[-1]
