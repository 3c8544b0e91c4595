"""GSM8K: grade-school word problems with a worked solution (the expert) and a socratic one (the teacher).

A sample ships with the package (256 training and 64 test problems; MIT, Cobbe et al. 2021, "Training Verifiers to
Solve Math Word Problems"; licence in samples/GSM8K_LICENSE.txt). The full set is read from its parquet files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from gft_kernels.data.fields import is_text
from gft_kernels.data.readers import Record, read_records

SAMPLE = Path(__file__).parent / "samples"
CALCULATION = re.compile(r"<<[^>]*>>")
FINAL_LINE = re.compile(r"(?:.*\n)*#### -?[\d,.]+\s*")


def read_rows(path: str | Path | None = None, split: str = "train") -> list[Record]:
    """Rows for the trainer: prompt, demonstrations (main solution, then the socratic one if there is one), answer.

    path: None for the shipped sample; a directory with train.parquet and test.parquet; or one such file. Columns
    `question` and `answer`; the socratic solutions lie in the directory `socratic` beside it, in the same order.
    Raises: FileNotFoundError, RowError naming file, row and field.
    """
    if path is None:
        source = read_records(SAMPLE / f"gsm8k_{split}.jsonl")
        return [_row(Path(r.where).name, r["question"], [r["main"], r["socratic"]]) for r in source]
    path = Path(path)
    main = path / f"{split}.parquet" if path.is_dir() else path
    records = [_checked(record) for record in read_records(main)]
    beside = main.parent / "socratic" / main.name
    if not beside.is_file():
        return [_row(r.where, r["question"], [r["answer"]]) for r in records]
    socratic = {r["question"]: r["answer"] for r in map(_checked, read_records(beside))}
    for r in records:
        r.require(r["question"] in socratic, "question", f"occur in {beside} as well", r["question"])
    return [_row(r.where, r["question"], [r["answer"], socratic[r["question"]]]) for r in records]


def _checked(record: Record) -> Record:
    for name in ("question", "answer"):
        record.require(is_text(record.get(name)), name, "be text", record.get(name))
    record.require("####" in record["answer"], "answer", "end in a line '#### <number>'", record["answer"])
    return record


def _row(where, question, solutions) -> Record:
    """Calculator annotations like <<48/2=24>> are left out: the text around them says the same."""
    answer = solutions[0].rpartition("####")[2].strip()
    texts = [CALCULATION.sub("", solution) for solution in solutions]
    return Record.at(where, {"prompt": f"Question: {question}\nAnswer:\n", "demonstrations": texts, "answer": answer})


def has_final_line(prompts: Sequence[str], completions: Sequence[str], **columns) -> list[float]:
    """1 where the completion ends in a line "#### <number>", whatever the number; else 0. A measure of form."""
    return [float(FINAL_LINE.fullmatch(text) is not None) for text in completions]
