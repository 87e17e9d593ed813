"""A person's table as pairs: every kind of source and of cell, and what is wrong with a row."""

import csv
import io
import json

import datasets
import numpy as np
import pypdfium2
import pytest
from PIL import Image

from q3vl_mini.media import load_image
from q3vl_mini.pages import PdfPage
from q3vl_mini.pairs import Fault, Pair, Row, read_pairs


@pytest.fixture
def red(tmp_path):
    """A red picture of 40 x 30 pixels beside the tables."""
    Image.new("RGB", (40, 30), (255, 0, 0)).save(tmp_path / "red.png")
    return tmp_path / "red.png"


def write_jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def colour(instance):
    return load_image(instance["image"])[0, 0].tolist()


def test_a_csv_has_texts_paths_mixes_and_lists(tmp_path, red):
    with open(tmp_path / "t.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["title", "positive", "negatives", "instruction", "score"])
        writer.writerow(["a red thing", "red.png", '["one", "red.png"]', "Find it.", "0.5"])
        writer.writerow(['{"text": "more", "image": "red.png"}', "{not json}", "", "", ""])
    first, second = read_pairs(tmp_path / "t.csv", columns={"query": "title"})
    assert first.row == Row(0) and first.query == {"text": "a red thing", "instruction": "Find it."}
    assert first.positives == ({"image": str(red)},) and first.score == 0.5
    assert first.negatives == ({"text": "one"}, {"image": str(red)})
    assert second.query == {"text": "more", "image": str(red)} and second.score is None
    assert second.positives == ({"text": "{not json}"},) and second.negatives == ()


def test_a_data_set_in_memory_or_streamed_gives_its_pictures_as_stored(tmp_path, red):
    rows = {"query": ["r", "b"], "positive": [str(red), Image.new("RGB", (8, 8), (0, 0, 255))]}
    features = datasets.Features({"query": datasets.Value("string"), "positive": datasets.Image()})
    data = datasets.Dataset.from_dict(rows, features=features)
    data.to_parquet(tmp_path / "t.parquet")
    for source in (data, data.to_iterable_dataset(), tmp_path / "t.parquet"):
        pairs = list(read_pairs(source, media=tmp_path / "media"))
        assert [colour(pair.positives[0]) for pair in pairs] == [[255, 0, 0], [0, 0, 255]]
        assert isinstance(pairs[1].positives[0]["image"], str)  # a file now, and no longer in memory
    [only] = read_pairs([{"query": "r", "positive": Image.new("RGB", (8, 8), "red")}])
    assert colour(only.positives[0]) == [255, 0, 0]


def test_a_stream_is_read_row_by_row(red):
    taken = []

    def rows():
        for i in range(1000):
            taken.append(i)
            yield {"query": f"q{i}", "positive": f"p{i}"}

    first = next(read_pairs(rows()))
    assert first.query == {"text": "q0"} and len(taken) <= 100


def test_a_folder_has_captions_in_names_or_beside_the_pictures(tmp_path):
    for name in ("red-square.png", "sub/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    (tmp_path / "sub/b.txt").write_text("a square\n")
    pairs = list(read_pairs(tmp_path))
    assert [pair.query["text"] for pair in pairs] == ["red square", "a square"]
    paths = [str(tmp_path / "red-square.png"), str(tmp_path / "sub/b.png")]
    assert [pair.positives[0]["image"] for pair in pairs] == paths


def test_a_folder_with_metadata_is_read_as_imagefolder_reads_it(tmp_path):
    for name, value in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (8, 8), value).save(tmp_path / name)
    rows = [{"file_name": "b.png", "text": "sea"}, {"file_name": "a.png", "text": "fire"}]
    write_jsonl(tmp_path / "metadata.jsonl", rows)
    theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), split="train", cache_dir=str(tmp_path / "c"))
    ours = {pair.query["text"]: colour(pair.positives[0]) for pair in read_pairs(tmp_path)}
    assert ours == {row["text"]: np.asarray(row["image"])[0, 0].tolist() for row in theirs}
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "title": "fire"}))
    [pair] = read_pairs(tmp_path, columns={"query": "title"})
    assert pair.query == {"text": "fire"}
    write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "text": "fire", "negatives": ["b.png", "water"]}])
    [pair] = read_pairs(tmp_path)  # files count from the folder of the metadata, whatever folder we are in
    assert colour(pair.negatives[0]) == [0, 0, 255] and pair.negatives[1] == {"text": "water"}


def test_a_page_of_a_pdf_is_a_picture(tmp_path):
    pdf = pypdfium2.PdfDocument.new()
    for width in (72, 144):
        pdf.new_page(width, 36)
    pdf.save(str(tmp_path / "m.pdf"))
    rows = [{"query": "wide", "positive": "m.pdf#page=2"}, {"query": "x", "positive": "m.pdf"}]
    write_jsonl(tmp_path / "t.jsonl", rows)
    pair, fault = read_pairs(tmp_path / "t.jsonl")
    page = pair.positives[0]["image"]
    assert page == PdfPage(str(tmp_path / "m.pdf"), 2) and load_image(page).shape == (72, 288, 3)  # 2 pixels a point
    assert fault.kind == "wrong type" and "m.pdf#page=1" in fault.message
    with pytest.raises(ValueError, match="pages 1 to 2, and no page 3"):
        PdfPage(str(tmp_path / "m.pdf"), 3).render()


@pytest.mark.parametrize(
    ("row", "column", "kind"),
    [
        ({"query": " ", "positive": "p"}, "query", "empty cell"),
        ({"query": "q", "positive": None}, "positive", "empty cell"),
        ({"query": "q", "positive": {"text": ""}}, "positive", "empty cell"),
        ({"query": "q", "positive": "gone.png"}, "positive", "missing file"),
        ({"query": {"text": "a", "image": "gone.png"}, "positive": "p"}, "query", "missing file"),
        ({"query": "q", "positive": "gone.pdf#page=1"}, "positive", "missing file"),
        ({"query": "q", "positive": "https://example.org/a.png"}, "positive", "missing file"),
        ({"query": 7, "positive": "p"}, "query", "wrong type"),
        ({"query": "q", "positive": {"picture": "a.png"}}, "positive", "wrong type"),
        ({"query": "q", "positive": "p", "score": "high"}, "score", "wrong type"),
        ({"query": "q", "positive": "p", "score": True}, "score", "wrong type"),
        ({"query": "q", "positive": "p", "instruction": 3}, "instruction", "wrong type"),
        ({"query": "q", "positive": "p", "split": "dev"}, "split", "wrong type"),
    ],
)
def test_a_bad_cell_is_named_and_the_next_row_is_read(tmp_path, row, column, kind):
    bad, good = read_pairs(write_jsonl(tmp_path / "t.jsonl", [row, {"query": "q", "positive": "p"}]))
    assert isinstance(bad, Fault) and (bad.row, bad.column, bad.kind) == (Row(0), column, kind)
    assert str(bad).startswith(f"row 0, {column}: {kind}: ")
    assert isinstance(good, Pair) and good.row == Row(1)


def test_no_path_of_a_table_leads_out_of_its_folder(tmp_path, red):
    (tmp_path / "sub").mkdir()
    places = ["../red.png", str(red), "../m.pdf#page=1", "nothing/../../red.png"]
    rows = [{"query": "q", "positive": place} for place in places]
    table = write_jsonl(tmp_path / "sub" / "t.jsonl", rows)
    write_jsonl(tmp_path / "sub" / "metadata.jsonl", [{"file_name": "../red.png", "text": "x"}])
    for data in (table, tmp_path / "sub"):
        faults = list(read_pairs(data))
        assert {fault.kind for fault in faults} == {"path outside"} and len(faults) in (1, 4)
        assert "name the folder that holds both" in faults[0].message
    first, second, *_ = read_pairs(table, root=tmp_path)  # its owner says that they belong together
    assert colour(first.positives[0]) == colour(second.positives[0]) == [255, 0, 0]
    [pair] = read_pairs([{"query": "q", "positive": str(red)}])  # rows that a program makes
    assert colour(pair.positives[0]) == [255, 0, 0]


def test_rows_that_are_none_and_broken_texts_are_faults():
    good = {"query": "q", "positive": "p"}
    found = list(read_pairs([good, ["q", "p"], {"query": "half \ud83d", "positive": "p"}, good]))
    assert [type(x) for x in found] == [Pair, Fault, Fault, Pair]
    assert [fault.kind for fault in found[1:3]] == ["wrong type", "broken text"]
    with pytest.raises(ValueError, match=r"no column \['query', 'positive'\] among rows such as 3"):
        list(read_pairs([3, 4]))


def test_an_odd_name_of_a_stored_picture_does_not_name_the_file(tmp_path):
    rows = [{"query": "q", "positive": {"bytes": b"x", "path": path}} for path in ("a.p\0ng", "b.exe", 7)]
    for pair in read_pairs(rows, media=tmp_path / "media"):
        assert "." not in pair.positives[0]["image"].rpartition("/")[2]


def test_a_bad_negative_leaves_the_pair(tmp_path):
    rows = [{"query": "q", "positive": "p", "negatives": ["n", "gone.png", 3]}]
    *faults, pair = read_pairs(write_jsonl(tmp_path / "t.jsonl", rows))
    assert [fault.kind for fault in faults] == ["missing file", "wrong type"]
    assert pair.negatives == ({"text": "n"},)


def test_kinds_say_what_a_string_is(tmp_path, red):
    red.rename(tmp_path / "red")
    rows = [{"query": "how to open a file.png", "positive": "red"}]
    [pair] = read_pairs(write_jsonl(tmp_path / "t.jsonl", rows), kinds={"query": "text", "positive": "image"})
    assert pair.query == {"text": "how to open a file.png"} and colour(pair.positives[0]) == [255, 0, 0]


def test_splits_come_as_sources_or_as_a_column():
    parts = {"train": [{"query": "a", "positive": "b"}], "test": [{"query": "c", "positive": "d"}]}
    pairs = list(read_pairs(parts))
    assert [(pair.split, str(pair.row)) for pair in pairs] == [("train", "train row 0"), ("test", "test row 0")]
    [pair] = read_pairs([{"query": "a", "positive": "b", "split": "validation"}])
    assert pair.split == "validation"


def test_errors_of_the_whole_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"no column \['query'\] among \['a', 'positive'\].*columns="):
        list(read_pairs([{"a": "x", "positive": "y"}]))
    with pytest.raises(ValueError, match="unknown columns"):
        list(read_pairs([], columns={"title": "x"}))
    with pytest.raises(ValueError, match="unknown splits"):
        list(read_pairs({"dev": []}))
    with pytest.raises(ValueError, match="no rows"):
        list(read_pairs([]))
    with pytest.raises(ValueError, match="int is no data"):
        list(read_pairs(7))


def test_bytes_that_are_given_twice_are_kept_once(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    rows = [{"query": f"q{i}", "positive": {"bytes": buffer.getvalue(), "path": "a/b.png"}} for i in range(3)]
    files = {pair.positives[0]["image"] for pair in read_pairs(rows, media=tmp_path / "media")}
    assert len(files) == 1 and files.pop().endswith(".png") and len(list((tmp_path / "media").iterdir())) == 1


def test_a_name_that_no_file_can_have_is_a_missing_file(tmp_path):
    rows = [{"query": "q", "positive": {"image": name}} for name in ("a" * 5000, "a\0b", "a/" * 3000)]
    faults = list(read_pairs(write_jsonl(tmp_path / "t.jsonl", rows)))
    assert [(fault.row.number, fault.kind) for fault in faults] == [(n, "missing file") for n in range(3)]


def test_a_data_set_that_was_saved_to_disk_is_read_with_its_splits(tmp_path):
    parts = {split: datasets.Dataset.from_list([{"query": split, "positive": "x"}]) for split in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    parts["train"].save_to_disk(tmp_path / "one")
    assert [(pair.query, pair.split) for pair in read_pairs(tmp_path / "both")] == [
        ({"text": "train"}, "train"),
        ({"text": "test"}, "test"),
    ]
    assert [(pair.query, pair.split) for pair in read_pairs(tmp_path / "one")] == [({"text": "train"}, None)]


def test_folders_that_are_called_like_splits_are_splits(tmp_path):
    for split in ("train", "validation", "test"):
        (tmp_path / split).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / split / f"red_{split}.png")
    assert {(pair.query["text"], pair.split) for pair in read_pairs(tmp_path)} == {
        (f"red {split}", split) for split in ("train", "validation", "test")
    }
    Image.new("RGB", (8, 8)).save(tmp_path / "beside.png")
    assert {pair.split for pair in read_pairs(tmp_path)} == {None}
