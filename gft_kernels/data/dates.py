"""The date of a sentence as YYYY-MM-DD, with one example in the chat: a strict form and little to say.

The verifier is answers.exact_answer. The expert writes the date; a teacher writes it in another form, or another date.
No date that the rows to train on ask for is asked for in those held out, and none is the example's.
"""

from __future__ import annotations

import datetime
import random
from pathlib import Path

from gft_kernels.data.readers import refuse_file

EXAMPLE = (
    {"role": "system", "content": "Write the date as YYYY-MM-DD."},
    {"role": "user", "content": "The shop opened on May 7, 1984."},
    {"role": "assistant", "content": "1984-05-07"},
)
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
SPELLINGS = ("{month} {day}, {year}", "{day} {month} {year}", "{month} {day} of {year}")
SENTENCES = (
    "The bridge was finished on {date}.",
    "She was born on {date}.",
    "They signed the contract on {date}.",
    "Our first train left on {date}.",
    "The letter is dated {date}.",
    "On {date} the museum closed.",
)
FIRST, DAYS = datetime.date(1950, 1, 1), 27_000
HELD_OUT = 4  # every fourth day


def date_of(split: str, rng: random.Random) -> datetime.date:
    """A random day of one split: those of "train" and of any other share none."""
    number = rng.randrange(DAYS // HELD_OUT) * HELD_OUT
    return FIRST + datetime.timedelta(number + (rng.randrange(HELD_OUT - 1) if split == "train" else HELD_OUT - 1))


def records(count: int, split: str = "train", seed: int = 1) -> list[dict]:
    """Rows for GFT: messages, the expert's date and one teacher's answer, the four kinds of them in turn."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        date = date_of(split, rng)
        while date.isoformat() == EXAMPLE[-1]["content"]:
            date = date_of(split, rng)
        said = spelled(date, rng.choice(SPELLINGS))
        asked = [*EXAMPLE, {"role": "user", "content": rng.choice(SENTENCES).format(date=said)}]
        given = [date.isoformat(), teacher(date, i % 4)]
        rows.append({"prompt": asked, "demonstrations": given, "answer": date.isoformat()})
    return rows


def spelled(date: datetime.date, form: str) -> str:
    return form.format(month=MONTHS[date.month - 1], day=date.day, year=date.year)


def teacher(date: datetime.date, kind: int) -> str:
    """A wrong answer: other separators, words, the day before, month and year of another."""
    if kind == 0:
        return date.strftime("%d/%m/%Y")
    if kind == 1:
        return spelled(date, SPELLINGS[0])
    if kind == 2:
        return (date - datetime.timedelta(1)).isoformat()
    return date.replace(year=date.year + 1, day=1).isoformat()


def read_rows(path: str | Path | None = None, split: str = "train") -> list[dict]:
    """The reader for `gft train`: 256 rows to train on or 64 held out, made on the fly; there is no file to read."""
    refuse_file(path, "dates")
    return records(256) if split == "train" else records(64, split, seed=9)
