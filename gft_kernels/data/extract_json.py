"""Name, age and city of a sentence as a JSON object, with one example in the chat: what small models are tuned for.

The verifier is answers.json_answer: exact fields and types, and nothing around the object. The expert writes that; a
teacher writes the right facts in a wrong form, or a wrong fact in the right form. No name, age or city of the rows to
train on occurs in those held out.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from gft_kernels.data.readers import refuse_file

EXAMPLE = (
    {"role": "system", "content": "Extract name, age and city as a JSON object."},
    {"role": "user", "content": "Maria is 31 years old and lives in Delhi."},
    {"role": "assistant", "content": '{"name": "Maria", "age": 31, "city": "Delhi"}'},
)
NAMES = (
    "Anna", "Bruno", "Carla", "David", "Elena", "Felix", "Grace", "Hugo", "Irene", "Jonas", "Karin", "Luca",
    "Marta", "Nadia", "Oscar", "Paula", "Quentin", "Rosa", "Simon", "Teresa", "Ulrich", "Vera", "Walter", "Yusuf",
    "Amir", "Bianca", "Chloe", "Diego", "Emma", "Farid", "Greta", "Hannah", "Ivan", "Julia", "Kenji", "Laura",
    "Miguel", "Nora", "Omar", "Priya",
)  # fmt: skip
CITIES = (
    "Lisbon", "Oslo", "Madrid", "Vienna", "Prague", "Dublin", "Athens", "Berlin", "Paris", "London", "Rome", "Zurich",
    "Boston", "Chicago", "Denver", "Seattle", "Toronto", "Sydney", "Tokyo", "Seoul", "Cairo", "Nairobi", "Lima",
    "Quito", "Warsaw", "Milan", "Porto", "Bergen", "Geneva", "Austin", "Dallas", "Ottawa", "Kyoto", "Mumbai", "Accra",
    "Bogota", "Havana", "Helsinki", "Munich", "Naples",
)  # fmt: skip
AGES = tuple(range(18, 90))
SENTENCES = (
    "{name} is {age} years old and lives in {city}.",
    "{name}, aged {age}, comes from {city}.",
    "At {age}, {name} moved to {city}.",
    "In {city} we met {name}, who is {age}.",
    "My neighbour {name} from {city} turned {age} last week.",
    "{name} ({age}) runs a small shop in {city}.",
)
HELD_OUT = 4  # every fourth name, age and city


def pool(values: tuple, split: str) -> list:
    """The values of one split: those of "train" and of any other share none."""
    return [value for i, value in enumerate(values) if (i % HELD_OUT == HELD_OUT - 1) == (split != "train")]


def records(count: int, split: str = "train", seed: int = 1) -> list[dict]:
    """Rows for GFT: messages, the expert's object and one teacher's answer, the four kinds of them in turn."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        facts = {"name": rng.choice(pool(NAMES, split)), "age": rng.choice(pool(AGES, split))}
        facts["city"] = rng.choice(pool(CITIES, split))
        asked = [*EXAMPLE, {"role": "user", "content": rng.choice(SENTENCES).format(**facts)}]
        given = [json.dumps(facts), teacher(facts, i % 4, rng, split)]
        rows.append({"prompt": asked, "demonstrations": given, "answer": facts})
    return rows


def teacher(facts: dict, kind: int, rng: random.Random, split: str) -> str:
    """A wrong answer: the age as text, no JSON, another city, another age."""
    if kind == 0:
        return json.dumps({**facts, "age": str(facts["age"])})
    if kind == 1:
        return "Name: {name}, age: {age}, city: {city}".format(**facts)
    if kind == 2:
        return json.dumps({**facts, "city": rng.choice([c for c in pool(CITIES, split) if c != facts["city"]])})
    return json.dumps({**facts, "age": rng.choice([a for a in pool(AGES, split) if a != facts["age"]])})


def read_rows(path: str | Path | None = None, split: str = "train") -> list[dict]:
    """The reader for `gft train`: 256 rows to train on or 64 held out, made on the fly; there is no file to read."""
    refuse_file(path, "this extraction")
    return records(256) if split == "train" else records(64, split, seed=9)
