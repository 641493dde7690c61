"""Rows of local files as dictionaries, in stored order."""

import csv
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from tensorllm.data.opening import ending, lines_of
from tensorllm.environment import name_in_utf8
from tensorllm.errors import UserError
from tensorllm.io import from_json

Row = Mapping[str, Any]
PARQUET_ROWS = 32  # in memory at once: rows may hold whole articles
LONGEST = 2**31 - 1  # characters of a CSV field; Python's default limit is shorter than an article
KNOWN = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


def rows_of_file(path: Path) -> Iterator[Row]:
    """The rows of a jsonl, json, csv, tsv or parquet file, one at a time.

    Raises:
        UserError: the file is missing, empty or malformed (names the line).
    """
    if not path.is_file():
        why = "Is a directory" if path.is_dir() else "No such file or directory"
        raise UserError(f"cannot read the rows of {str(path)!r}: {why}")
    suffix = ending(path)
    readers = {".csv": _csv, ".tsv": _csv, ".parquet": _parquet, ".json": _json}
    if suffix not in KNOWN:
        known = ", ".join(KNOWN)
        raise UserError(f"a file of rows must end in one of {known}, got {path.name!r}")
    if suffix == ".parquet" and path.suffix.lower() != suffix:
        raise UserError(f"parquet is compressed in itself; unpack {path.name!r}")
    rows = readers.get(suffix, _jsonl)(path)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{path} has no rows")
    return itertools.chain([first], rows)


def _row(row: object, where: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{where}: each row must be an object with named fields, got {row!r:.60}")
    return row


def _jsonl(path: Path) -> Iterator[Row]:
    with closing(lines_of(path)) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            if number == 1 and line.lstrip().startswith("["):  # a JSON list under another name
                yield from _json(path)
                return
            try:
                row = from_json(line.rstrip("\r\n"))  # else an error may name the next line
            except json.JSONDecodeError as error:
                raise UserError(f"{path}: malformed JSON on line {number}: {_why(error)}") from None
            yield _row(row, f"{path}, line {number}")


def _why(error: json.JSONDecodeError) -> str:
    return f"{error.msg.removesuffix(' at')} at column {error.colno}"


def json_items(path: Path) -> list[Any]:
    """The items of a JSON list, of an object's only list, or of JSON Lines.

    An object may hold its list under any name (`data`, `examples`, ...). Many programs write JSON
    Lines into files named .json.
    """
    lines = list(lines_of(path))
    if (rows := _as_lines(lines, path)) is not None:
        return rows
    try:
        loaded = from_json("".join(lines))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: malformed JSON on line {error.lineno}: {_why(error)}") from None
    if isinstance(loaded, dict):
        lists = [value for value in loaded.values() if isinstance(value, list)]
        loaded = lists[0] if len(lists) == 1 else loaded
    if not isinstance(loaded, list):
        raise UserError(f"{path} must hold a JSON list of rows, got {type(loaded).__name__}")
    return loaded


def _as_lines(lines: Sequence[str], path: Path) -> list[Any] | None:
    """The rows of JSON Lines; None if the text is one JSON value over several lines.

    It is JSON Lines if the first line is a whole row, and not an object whose one field is a list.
    """
    filled = [line for line in lines if line.strip()]
    try:
        first = from_json(filled[0]) if filled else None
    except json.JSONDecodeError:
        return None
    held = list(first.values()) if isinstance(first, dict) else []
    alone = len(filled) == 1
    wraps = any(isinstance(v, list) and all(isinstance(row, dict) for row in v) for v in held)
    if not isinstance(first, dict) or (alone and (wraps or len(held) < 2)):
        return None
    return list(_jsonl(path))


def _json(path: Path) -> Iterator[Row]:
    for number, row in enumerate(json_items(path), 1):
        yield _row(row, f"{path}, row {number}")


def _csv(path: Path) -> Iterator[Row]:
    delimiter = "\t" if ending(path) == ".tsv" else ","
    csv.field_size_limit(LONGEST)
    with closing(lines_of(path)) as lines:
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        try:
            for name, count in Counter(reader.fieldnames or ()).items():
                if name and count > 1:  # a row would have the last one only
                    raise UserError(f"{path}: {count} columns are named {name!r}")
            for row in reader:
                if None in row or None in row.values():
                    wanted = len(reader.fieldnames or ())
                    raise UserError(f"{path}, line {reader.line_num}: expected {wanted} fields")
                yield row
        except csv.Error as error:
            raise UserError(f"{path}: malformed CSV on line {reader.line_num}: {error}") from None


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as opened, pq.ParquetFile(name_in_utf8(opened)) as file:
            for batch in file.iter_batches(PARQUET_ROWS):
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise UserError(f"{path} is not a readable parquet file: {str(error)[:120]}") from None


def field_of(row: Row, names: tuple[str, ...], where: str) -> str:
    """The first of `names` that the row has.

    Raises:
        UserError: it has none of them.
    """
    for name in names:
        if name in row:
            return name
    close = get_close_matches(names[0], list(row), n=1)
    hint = f"; perhaps {close[0]!r} should be {names[0]!r}" if close else ""
    raise UserError(
        f"{where} must have a field named {' or '.join(map(repr, names))}, "
        f"got {', '.join(map(repr, row))}{hint}"
    )
