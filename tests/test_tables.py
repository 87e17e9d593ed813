"""Tables on disk: every format gives the same rows, and a bad line is handed on with its place."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from q3vl_mini.tables import read_rows

ROWS = [{"query": "ein Käse, rund", "n": "1"}, {"query": 'two\nlines "quoted"', "n": "2"}]


def test_every_format_gives_the_same_rows(tmp_path):
    (tmp_path / "t.jsonl").write_text("\n\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    with open(tmp_path / "t.csv", "w", encoding="utf-8-sig", newline="") as file:  # as Excel writes it
        writer = csv.DictWriter(file, ["query", "n"])
        writer.writeheader()
        writer.writerows(ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "t.parquet")
    for ending in ("jsonl", "csv", "parquet"):
        assert list(read_rows(tmp_path / f"t.{ending}")) == ROWS, ending


def test_a_bad_line_comes_as_an_error_and_the_next_is_read(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"a": 1}\n{"a": \n[1]\n{"a": 4}\n')
    first, broken, listed, last = read_rows(tmp_path / "t.jsonl")
    assert (first, last) == ({"a": 1}, {"a": 4})
    assert "line 2: not JSON" in str(broken) and "line 3: a list" in str(listed)
    (tmp_path / "t.csv").write_text("a,b\n1,2\n1,2,3\n4,5\n")
    first, broken, last = read_rows(tmp_path / "t.csv")
    assert last == {"a": "4", "b": "5"} and "line 3: 1 cells too many" in str(broken)


def test_lines_that_no_reader_takes_are_named_and_the_next_is_read(tmp_path):
    lines = [b'{"a": "\xff"}', b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b'{"a": 4}']
    (tmp_path / "t.jsonl").write_bytes(b"\n".join(lines))
    *broken, last = read_rows(tmp_path / "t.jsonl")
    assert last == {"a": 4} and [f"line {n}: not JSON" in str(x) for n, x in enumerate(broken, 1)] == [True] * 3
    (tmp_path / "t.csv").write_bytes(b"a,b\n\xff,2\n" + b"x" * 200_000 + b",2\n4,5\n")
    latin, long, last = read_rows(tmp_path / "t.csv")
    assert last == {"a": "4", "b": "5"}
    assert "line 2: bytes that are not UTF-8" in str(latin) and "after line 2: field larger than" in str(long)
    bad = pa.array([b"fine", b"\xff", b"also fine"]).view(pa.string())
    pq.write_table(pa.table({"a": bad}), tmp_path / "t.parquet")
    first, broken, last = read_rows(tmp_path / "t.parquet")
    assert (first, last) == ({"a": "fine"}, {"a": "also fine"}) and "row 1: cannot be read" in str(broken)


def test_a_table_that_cannot_be_read_at_all_is_named(tmp_path):
    (tmp_path / "t.csv").write_text("a,a\n1,2\n")
    with pytest.raises(ValueError, match=r"t.csv has several columns called \['a'\]"):
        list(read_rows(tmp_path / "t.csv"))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "t.parquet")
    (tmp_path / "t.parquet").write_bytes((tmp_path / "t.parquet").read_bytes()[:-20])
    with pytest.raises(ValueError, match="t.parquet is no Parquet file, or cut off"):
        list(read_rows(tmp_path / "t.parquet"))


def test_what_is_no_table_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        list(read_rows(tmp_path / "absent.csv"))
    with pytest.raises(ValueError, match="tables end in"):
        list(read_rows(tmp_path / "t.xlsx"))
