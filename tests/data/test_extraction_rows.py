"""The extraction tasks: their verifiers, their experts and teachers, and that held-out values are never trained on."""

from __future__ import annotations

import datetime
import json
import re

import pytest

from gft_kernels.data import dates, extract_json
from gft_kernels.data.answers import canonical, exact_answer, json_answer

PERSON = {"name": "Zoë", "age": 34, "city": None}


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ('{"city": null, "age": 34, "name": "Zo\\u00eb"}\n', PERSON, 1.0),
        (' {"name":"Zoë","age":34,"city":null}', json.dumps(PERSON), 1.0),
        ('{"name": "Zoë", "age": "34", "city": null}', PERSON, 0.0),  # text for a number
        ('{"name": "Zoë", "age": 34.0, "city": null}', PERSON, 0.0),
        ('{"name": "Zoë", "age": 34}', PERSON, 0.0),
        ('{"name": "Zoë", "age": 34, "city": null, "job": 1}', PERSON, 0.0),
        ('{"name": "Zoë", "age": 3, "age": 34, "city": null}', PERSON, 0.0),  # a field twice
        ('```json\n{"name": "Zoë", "age": 34, "city": null}\n```', PERSON, 0.0),
        ("{'name': 'Zoë', 'age': 34, 'city': None}", PERSON, 0.0),
        ("true", 1, 0.0),
        ("NaN", "1", 0.0),
        ("[" * 100_000, "1", 0.0),
        ("", "null", 0.0),
    ],
)
def test_json_answer(completion, answer, reward):
    assert json_answer(["?"], [completion], [answer]) == [reward]


@pytest.mark.parametrize("answer", ["Rome", "1e400"])  # a number beyond float64 would equal any other
def test_an_answer_that_is_no_json_is_an_error_not_a_zero(answer):
    with pytest.raises(ValueError, match=f"field `answer` must be JSON, got '{answer}'"):
        json_answer(["?"] * 2, ["1", "1e500"], ["1", answer])


def test_exact_answer():
    said = [" 1984-05-07\n", "1984-05-07.", "on 1984-05-07", ""]
    assert exact_answer(["?"] * 4, said, ["1984-05-07"] * 4) == [1, 0, 0, 0]
    assert exact_answer(["?"], ["7"], [7]) == [1.0]


def values_of(row) -> set[str]:
    return set(map(str, row["answer"].values())) if isinstance(row["answer"], dict) else {row["answer"]}


@pytest.mark.parametrize(("task", "verify"), [(extract_json, json_answer), (dates, exact_answer)])
def test_an_extraction_asks_for_other_values_in_training_than_held_out(task, verify):
    """The expert is right, the teachers, four kinds of them, are wrong; the sentence holds what is asked for."""
    train, held_out = task.read_rows(), task.read_rows(split="test")
    assert (len(train), len(held_out)) == (256, 64) and train == task.read_rows()
    assert not set.union(*map(values_of, train)) & set.union(*map(values_of, held_out))
    for row in train + held_out:
        assert verify([row["prompt"]] * 2, row["demonstrations"], [row["answer"]] * 2) == [1.0, 0.0]
        said = row["prompt"][-1]["content"]
        assert all(value in said for value in values_of(row)) or task is dates
    kinds = {len(canonical(row["demonstrations"][1]) or "") > 0 for row in train}
    assert kinds == ({True, False} if task is extract_json else {False})
    with pytest.raises(ValueError, match=r"data must be 'sample' for .*, got 'rows.jsonl'; the rows are"):
        task.read_rows("rows.jsonl")


def test_dates_are_those_of_the_sentences():
    for row in dates.records(200, seed=3):
        date = datetime.date.fromisoformat(row["answer"])
        said = row["prompt"][-1]["content"]
        assert f"{date:%B}" in said and str(date.year) in said and re.search(rf"\b{date.day}\b", said)
        assert row["answer"] != dates.EXAMPLE[-1]["content"]
