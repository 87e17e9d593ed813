"""Tables on disk, row by row: JSON lines, CSV and Parquet, read as they are needed."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .records import lone_surrogate

TABLES = (".jsonl", ".csv", ".parquet")
ROWS_AT_ONCE = 1024  # of a Parquet file in memory


def read_rows(path: str | Path) -> Iterator[dict[str, Any] | ValueError]:
    """The rows of a table, one at a time. A line that cannot be read comes as the ValueError that says why.

    The reader decides whether to raise it or to go on. Empty lines do not count as rows.

    Raises:
        FileNotFoundError: there is no such file. ValueError: its name ends in none of TABLES.
    """
    path = Path(path)
    if path.suffix.lower() not in TABLES:
        raise ValueError(f"{path} is no table; tables end in {', '.join(TABLES)}")
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; give a table ({', '.join(TABLES)})")
    if path.suffix.lower() == ".parquet":
        yield from _parquet_rows(path)
    elif path.suffix.lower() == ".csv":
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            yield from _csv_rows(path, file)
    else:
        with open(path, "rb") as file:
            yield from _json_rows(path, file)


def _parquet_rows(path: Path) -> Iterator[dict[str, Any] | ValueError]:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is no Parquet file, or cut off ({error}); write it again") from error
    done = 0
    try:
        for part in file.iter_batches(ROWS_AT_ONCE):
            try:
                yield from part.to_pylist()
            except ValueError:  # a text that is not UTF-8 is among them
                yield from (_parquet_row(part.slice(i, 1), f"{path}, row {done + i}") for i in range(len(part)))
            done += len(part)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is damaged after row {done} ({error}); write it again") from error


def _parquet_row(row: pa.RecordBatch, where: str) -> dict[str, Any] | ValueError:
    try:
        return row.to_pylist()[0]
    except ValueError as error:
        return ValueError(f"{where}: cannot be read ({error}); write it again as UTF-8")


def _csv_rows(path: Path, file) -> Iterator[dict[str, Any] | ValueError]:
    reader = csv.DictReader(file)
    try:
        names = reader.fieldnames or []
    except csv.Error as error:
        raise ValueError(f"{path}, line 1: {error}; a CSV table begins with the names of its columns") from error
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path} has several columns called {twice}; give each a name of its own")
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield ValueError(f"{path}, after line {reader.line_num}: {error}; close its quotes, or write JSON lines")
            continue
        if None in row:
            extra = len(row[None])
            yield ValueError(f"{path}, line {reader.line_num}: {extra} cells too many; quote cells that hold commas")
        elif any(lone_surrogate(cell) is not None for cell in row.values() if cell):
            yield ValueError(f"{path}, line {reader.line_num}: bytes that are not UTF-8; save the table as UTF-8")
        else:
            yield row


def _json_rows(path: Path, file) -> Iterator[dict[str, Any] | ValueError]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except (ValueError, RecursionError) as error:
            yield ValueError(f"{path}, line {number}: not JSON in UTF-8 ({error}); write one object a line")
            continue
        if isinstance(row, dict):
            yield row
        else:
            yield ValueError(f"{path}, line {number}: a {type(row).__name__}; write one object a line")
