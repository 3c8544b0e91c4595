"""Files of rows: .jsonl, .json and .parquet. Each row knows its file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path


class RowError(ValueError):
    """A row of the data cannot be used; the message names its file, line and field."""


class Record(dict):
    """One row as read from a file, with the place it came from."""

    where = "a row"

    @classmethod
    def at(cls, where: str, fields: dict) -> Record:
        record = cls(fields)
        record.where = where
        return record

    def require(self, holds: bool, field: str, condition: str, value: object) -> None:
        """Raises RowError, which names place and field, where the condition does not hold of the value."""
        if not holds:
            raise RowError(f"{self.where}: field `{field}` must {condition}, got {value!r:.60}.")


def read_records(path: str | Path, name: str = "path") -> list[Record]:
    """Rows of a .jsonl, .json or .parquet file, each knowing its place; `name`: what errors call the path.

    Raises: RowError naming file and line; FileNotFoundError; ValueError for another kind of file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{name} must be a file, got {str(path)!r}; there is no such file.")
    if path.suffix not in READERS:
        raise ValueError(f"{name} must be a .jsonl, .json or .parquet file, got {str(path)!r}.")
    records = [_record(fields, where) for where, fields in READERS[path.suffix](path)]
    if not records:
        raise RowError(f"{path}: must hold at least one row, got none.")
    return records


def refuse_file(path: str | Path | None, what: str) -> None:
    """For readers of rows that are made on the fly. Raises ValueError where a file is named after all."""
    if path is not None:
        raise ValueError(
            f"data and eval_data must be 'sample' for {what}, got {str(path)!r}; the rows are made on the fly."
        )


def _record(fields: object, where: str) -> Record:
    if not isinstance(fields, dict):
        raise RowError(f"{where}: must be an object with fields, got {type(fields).__name__}.")
    return Record.at(where, fields)


def _json_lines(path: Path) -> Iterator[tuple[str, object]]:
    with path.open("rb") as lines:  # bytes, so that one that is no UTF-8 is found in its line
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{path}, line {number}"
                yield where, _parsed(line.rstrip(), path, where, number)


def _json(path: Path) -> Iterator[tuple[str, object]]:
    data = path.read_bytes()
    rows = _parsed(data, path, str(path), 1) if data.strip() else []
    if not isinstance(rows, list):
        raise RowError(f"{path}: must hold a list of rows, got {type(rows).__name__}.")
    for number, fields in enumerate(rows, 1):
        yield f"{path}, item {number}", fields


def _parsed(data: bytes, path: Path, where: str, line: int) -> object:
    """What the JSON text says. `line` is the number of its first line; a byte order mark before it is left out."""
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=fields_once)
    except UnicodeDecodeError as error:
        where, fault = f"{path}, line {line + data[: error.start].count(10)}", f"be UTF-8, got {error}"
    except json.JSONDecodeError as error:
        where = f"{path}, line {line + error.lineno - 1}"
        fault = f"be one JSON object, got {error.msg} in column {error.colno}"
    except RecursionError:
        fault = "be nested less deeply, got more levels than can be read"
    except ValueError as error:  # of fields_once, or of a number with thousands of digits
        fault = f"be one JSON object, got {error}"
    raise RowError(f"{where}: must {fault}.") from None


def fields_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object. Raises: ValueError for a field that stands twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {next(n for n in names if names.count(n) > 1)!r} twice in one object")
    return found


def _parquet(path: Path) -> Iterator[tuple[str, object]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise RowError(f"{path}: must be a readable parquet file, got {str(error).splitlines()[0]}") from None
    for number, fields in enumerate(table.to_pylist(), 1):
        yield f"{path}, row {number}", fields


READERS = {".jsonl": _json_lines, ".json": _json, ".parquet": _parquet}
