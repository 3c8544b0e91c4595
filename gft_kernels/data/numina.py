"""Mathematics with an expert's and teachers' solutions, in the columns of the paper's data (verl's format).

Each row: `prompt` = [{role, content}, ...], `reward_model` = {style, ground_truth}, and `extra_info` = {answer,
model_answer} with the expert's solution and a list of the teachers'.
"""

from __future__ import annotations

from pathlib import Path

from gft_kernels.data.fields import is_messages, is_text
from gft_kernels.data.readers import Record, read_records


def read_rows(path: str | Path, split: str = "train") -> list[Record]:
    """Rows for the trainer: prompt messages, demonstrations (expert, then teachers), answer (the ground truth).

    path: a .parquet, .jsonl or .json file, or a directory with `<split>.parquet`.
    Raises: FileNotFoundError, RowError naming file, row and field.
    """
    path = Path(path)
    return [_row(record) for record in read_records(path / f"{split}.parquet" if path.is_dir() else path)]


def _row(record: Record) -> Record:
    rule, extra, require = record.get("reward_model"), record.get("extra_info"), record.require
    require(is_messages(record.get("prompt")), "prompt", "be a list of {role, content} messages", record.get("prompt"))
    require(isinstance(rule, dict), "reward_model", "be {style, ground_truth}", rule)
    require(isinstance(extra, dict), "extra_info", "be {answer, model_answer}", extra)
    assert isinstance(rule, dict) and isinstance(extra, dict)
    style, truth = rule.get("style"), rule.get("ground_truth")
    expert, teachers = extra.get("answer"), extra.get("model_answer")
    require(style == "rule", "reward_model.style", "be 'rule', for no reward model is run", style)
    require(truth is not None and str(truth).strip() != "", "reward_model.ground_truth", "be given", truth)
    require(is_text(expert), "extra_info.answer", "be the expert's solution", expert)
    listed = isinstance(teachers, list) and all(map(is_text, teachers))
    require(listed, "extra_info.model_answer", "be a list of the teachers' solutions", teachers)
    row = {"prompt": record["prompt"], "demonstrations": [expert, *(teachers or ())], "answer": str(truth)}
    return Record.at(record.where, row)
