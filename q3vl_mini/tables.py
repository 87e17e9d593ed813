"""Tables on disk, row by row: JSON lines, CSV and Parquet, read as they are needed."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

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
        for part in pq.ParquetFile(path).iter_batches(ROWS_AT_ONCE):
            yield from part.to_pylist()
        return
    with open(path, encoding="utf-8-sig", newline="") as file:
        yield from _csv_rows(path, file) if path.suffix.lower() == ".csv" else _json_rows(path, file)


def _csv_rows(path: Path, file) -> Iterator[dict[str, Any] | ValueError]:
    reader = csv.DictReader(file)
    for row in reader:
        if None in row:
            extra = len(row[None])
            yield ValueError(f"{path}, line {reader.line_num}: {extra} cells too many; quote cells that hold commas")
        else:
            yield row


def _json_rows(path: Path, file) -> Iterator[dict[str, Any] | ValueError]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            yield ValueError(f"{path}, line {number}: not JSON ({error}); write one object a line")
            continue
        if isinstance(row, dict):
            yield row
        else:
            yield ValueError(f"{path}, line {number}: a {type(row).__name__}; write one object a line")
