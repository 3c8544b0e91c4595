"""Files of rows: what each kind holds, and how a broken one is named."""

from __future__ import annotations

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import trainer_rig as rig

from gft_kernels.data import gsm8k
from gft_kernels.trainer import RowError, read_records


def test_files_of_each_kind_know_their_lines(tmp_path):
    rows = rig.rows(3)
    (tmp_path / "a.jsonl").write_text("\n" + "\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    for name, unit, last in (("a.jsonl", "line", 4), ("a.json", "item", 3), ("a.parquet", "row", 3)):
        records = read_records(tmp_path / name)
        assert records == rows
        assert records[2].where == f"{tmp_path / name}, {unit} {last}"


@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_marks_and_line_ends_of_other_systems_are_read(tmp_path, name, end, before):
    lines = [b'{"prompt": "\xc3\xa9"}', b'{"prompt": "b"}']
    data = b"[" + (b"," + end).join(lines) + b"]" if name == "a.json" else end.join(lines) + end
    (tmp_path / name).write_bytes(before + data)
    assert read_records(tmp_path / name) == [{"prompt": "é"}, {"prompt": "b"}]


GOOD = b'{"prompt": "a"}'


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", GOOD + b'\n{"prompt":\r\n' + GOOD, r"a.jsonl, line 2: .* object, got Expecting value in column 11"),
        ("a.jsonl", b"[1]", r"a.jsonl, line 1: must be an object with fields, got list"),
        ("a.jsonl", GOOD + b'\n\n{"prompt": "\xff"}', r"a.jsonl, line 3: must be UTF-8, got 'utf-8' codec"),
        ("a.jsonl", GOOD.decode().encode("utf-16"), r"a.jsonl, line 1: must be UTF-8"),
        ("a.jsonl", b'{"a": ' + b"[" * 100_000, r"a.jsonl, line 1: must be nested less deeply"),
        ("a.jsonl", GOOD + b'\n{"a": 1, "b": {"c": 1, "c": 2}}', r"line 2: must be one JSON object, got the field 'c'"),
        ("a.jsonl", b'{"a": ' + b"1" * 5000 + b"}", r"line 1: must be one JSON object, got Exceeds the limit"),
        ("a.jsonl", b"", r"a.jsonl: must hold at least one row, got none"),
        ("a.jsonl", b"\n \n", r"a.jsonl: must hold at least one row, got none"),
        ("a.json", b"", r"a.json: must hold at least one row, got none"),
        ("a.json", b"[]", r"a.json: must hold at least one row, got none"),
        ("a.json", GOOD, r"a.json: must hold a list of rows, got dict"),
        ("a.json", b"[" + GOOD + b',\n{"prompt"}]', r"a.json, line 2: must be one JSON object, got Expecting"),
        ("a.json", b"[" + GOOD + b',\n{"prompt": "\xff"}]', r"a.json, line 2: must be UTF-8"),
        ("a.json", b"[" * 100_000, r"a.json: must be nested less deeply"),
        ("a.json", b'[{"a": 1, "a": 2}]', r"a.json: must be one JSON object, got the field 'a' twice"),
        ("a.json", b"[1]", r"a.json, item 1: must be an object with fields, got int"),
        ("a.parquet", b"", r"a.parquet: must be a readable parquet file, got "),
        ("a.parquet", b"PAR1 no PAR1", r"a.parquet: must be a readable parquet file, got "),
    ],
)
def test_what_is_no_row_is_named_by_file_and_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(RowError, match=message) as caught:
        read_records(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_table_holds_rows_and_each_column_once(tmp_path):
    column = pyarrow.array(["a"])
    for names, columns, message in (
        (["prompt", "prompt"], [column, column], "must be a readable parquet file, got Multiple matches"),
        (["prompt"], [column[:0]], "must hold at least one row, got none"),
    ):
        pyarrow.parquet.write_table(pyarrow.table(columns, names), tmp_path / "a.parquet")
        with pytest.raises(RowError, match=f"a.parquet: {message}"):
            read_records(tmp_path / "a.parquet")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("prompt\n")
    with pytest.raises(ValueError, match=r"must be a \.jsonl, \.json or \.parquet file, got"):
        read_records(tmp_path / "a.csv")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        read_records(tmp_path / "b.jsonl")


def test_gsm8k_parquet_files_become_rows(tmp_path):
    main = [{"question": f"q{i}", "answer": f"1+{i} = <<1+{i}=9>>9\n#### {i}"} for i in range(3)]
    socratic = [{"question": f"q{i}", "answer": f"How? ** {i}\n#### {i}"} for i in (2, 1, 0)]
    datasets.Dataset.from_list(main).to_parquet(tmp_path / "train.parquet")
    assert [len(r["demonstrations"]) for r in gsm8k.read_rows(tmp_path)] == [1, 1, 1]
    (tmp_path / "socratic").mkdir()
    datasets.Dataset.from_list(socratic).to_parquet(tmp_path / "socratic" / "train.parquet")
    rows = gsm8k.read_rows(tmp_path)
    assert rows[2]["demonstrations"] == ["1+2 = 9\n#### 2", "How? ** 2\n#### 2"] and rows[2]["answer"] == "2"
    assert rows[2].where == f"{tmp_path / 'train.parquet'}, row 3"
    for question, answer, message in (
        ("q0", "nine", "field `answer` must end in a line '#### <number>', got 'nine'"),
        ("q9", "#### 9", "field `question` must occur in .*socratic.* as well, got 'q9'"),
        (" ", "#### 9", "field `question` must be text, got ' '"),
    ):
        datasets.Dataset.from_list([{"question": question, "answer": answer}]).to_parquet(tmp_path / "train.parquet")
        with pytest.raises(RowError, match=f"train.parquet, row 1: {message}"):
            gsm8k.read_rows(tmp_path)
