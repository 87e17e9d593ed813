"""A folder of somebody else as training data: what cannot be used is left out and named, and the rest is as it was."""

import io
import json

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from q3vl_mini.data import load_quadruple, png_bytes, save_quadruple
from q3vl_mini.mining import mine
from q3vl_mini.records import Quadruple, Relevance, validate
from q3vl_mini.stages import sub_dataset
from q3vl_mini.usable import load_usable


def picture(i: int) -> bytes:
    return png_bytes(np.full((8, 8, 3), i, np.uint8))


@pytest.fixture
def folder(tmp_path):
    """20 queries; query i finds document i, a grey picture, and does not find the next."""
    relevance = [Relevance((i,), ((i + 1) % 20,)) for i in range(20)]
    queries, corpus = [{"text": f"grey {i}"} for i in range(20)], [{"image": picture(i)} for i in range(20)]
    save_quadruple(Quadruple("greys", "image_ret", "Find it.", queries, corpus, relevance), tmp_path / "greys")
    return tmp_path / "greys"


def changed(folder, part: str, change) -> None:
    """Write a table of the folder again after `change` of its rows."""
    rows = pq.read_table(folder / f"{part}.parquet").to_pylist()
    change(rows)
    features = datasets.Features.from_arrow_schema(pq.read_schema(folder / f"{part}.parquet"))
    for name, feature in features.items():
        if isinstance(feature, datasets.Image):
            features[name] = datasets.Image(decode=False)
    table = datasets.Dataset.from_list(rows, features=features).data.table
    pq.write_table(table, folder / f"{part}.parquet")


def grey(instance) -> int:
    return int(np.asarray(instance["image"])[0, 0, 0])


def test_what_is_sound_is_all_there(folder):
    whole = load_usable(folder, 100, seed=0)
    assert len(whole) == 20 and "left_out" not in whole.meta
    assert whole.relevance == load_quadruple(folder).relevance
    some, again = (load_usable(folder, 5, seed=1) for _ in range(2))
    assert [q["text"] for q in some.queries] == [q["text"] for q in again.queries] and len(some) == 5


def test_bad_rows_and_labels_are_left_out_and_named_and_the_others_keep_their_documents(folder):
    def break_corpus(rows):
        rows[3]["image"] = {"bytes": picture(3)[:40], "path": None}  # cut off
        rows[4]["image"] = {"bytes": None, "path": "/etc/hostname.png"}  # named, not embedded
        rows[5]["image"] = None
        rows[6]["id"] = "d7"

    def break_queries(rows):
        rows[8]["text"] = " "

    def break_labels(rows):
        rows[9]["positives"] = ["d9", "d77"]
        rows[10]["positives"] = ["d78"]
        del rows[11]

    changed(folder, "corpus", break_corpus)
    changed(folder, "queries", break_queries)
    changed(folder, "relevance", break_labels)
    found = load_usable(folder, 100, seed=0, may_skip=0.5)
    validate(found)
    assert [q["text"] for q in found.queries] == [f"grey {i}" for i in (0, 1, 2, 7, 9, *range(12, 20))]
    assert found.meta["left_out"]["documents"] == 4 and found.meta["left_out"]["queries"] == 7
    told = "\n".join(found.meta["left_out"]["first"])
    for words in (
        "document 3: corpus row 3, image: cannot read",
        "document 4: corpus row 4, image: names '/etc/hostname.png', and only files that the table holds are read",
        "document 5: has no text, image or video",
        "corpus row 7: the id 'd7' comes twice",
        "query 8: has no text, image or video",
        "query 'q6': corpus.parquet lacks 'd6', one of its positives",
        "query 'q9': corpus.parquet lacks 'd77', one of its positives",
        "query 10: no positive document",
        "query 'q11': relevance.parquet lacks 'q11'",
    ):
        assert words in told, told
    for query, labels in zip(found.queries, found.relevance, strict=True):
        number = int(query["text"].split()[1])
        shown = {grey(found.corpus[d]) for d in labels.positives}
        assert shown == {6 if number == 7 else number}  # rows 6 and 7 are called d7, and the first has the name


def test_a_broken_folder_is_an_error_where_a_person_opens_it(folder):
    changed(folder, "corpus", lambda rows: rows[3].update(image={"bytes": b"no picture", "path": None}))
    with pytest.raises(ValueError, match="corpus row 3, image: cannot read 10 bytes"):
        load_quadruple(folder).corpus[3]
    changed(folder, "corpus", lambda rows: rows[6].update(id="d7"))
    with pytest.raises(ValueError, match="corpus row 7: the id 'd7' comes twice; mend the table"):
        load_quadruple(folder)
    (folder / "card.json").write_text(json.dumps({"name": "greys"}))
    with pytest.raises(ValueError, match=r"card.json has no \['task', 'instruction', 'meta'\]"):
        load_quadruple(folder)
    (folder / "queries.parquet").write_bytes(b"PAR1")
    (folder / "card.json").write_text(json.dumps({"name": "", "task": "", "instruction": "", "meta": {}}))
    with pytest.raises(ValueError, match="queries.parquet is no Parquet file, or cut off"):
        load_quadruple(folder)


def test_an_address_in_a_table_is_not_fetched(folder):
    address = {"bytes": None, "path": "https://example.org/a.png"}
    changed(folder, "corpus", lambda rows: rows[3].update(image=address))
    for streaming in (False, True):
        with pytest.raises(ValueError, match="names 'https://example.org/a.png', and only files that the table holds"):
            load_quadruple(folder, streaming).corpus[3]


def test_too_many_bad_rows_end_the_job_before_it_begins(tmp_path):
    corpus, relevance = [{"image": picture(i)} for i in range(60)], [Relevance((i,)) for i in range(60)]
    queries = [{"text": f"q{i}"} for i in range(60)]
    save_quadruple(Quadruple("greys", "image_ret", "Find it.", queries, corpus, relevance), tmp_path / "greys")

    def cut(rows):
        for row in rows[:20]:
            row["image"] = {"bytes": b"cut", "path": None}

    changed(tmp_path / "greys", "corpus", cut)
    with pytest.raises(ValueError, match="greys: 40 of 120 queries and documents cannot be used: .*document 0"):
        load_usable(tmp_path / "greys", 100, seed=0)
    assert load_usable(tmp_path / "greys", 100, seed=0, may_skip=0.4).meta["left_out"]["documents"] == 20


def test_a_stage_gets_what_can_be_used(folder):
    changed(folder, "corpus", lambda rows: rows[3].update(image={"bytes": b"no picture", "path": None}))
    data = sub_dataset(str(folder), 100, 0)
    assert len(data) == 19 and len(data.corpus) == 19 and data.meta["left_out"]["documents"] == 1
    vectors = np.random.default_rng(0).standard_normal((38, 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    mined = mine(data, vectors[:19], vectors[19:], k=19, t_plus=-1, delta_minus=2, n_negatives=3).to_quadruple()
    validate(mined)
    assert mined.meta["left_out"] == data.meta["left_out"]


def test_a_picture_in_a_table_is_the_picture_that_was_stored(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(buffer, "PNG")
    corpus = [{"image": buffer.getvalue()}]
    save_quadruple(Quadruple("a", "image_ret", "Find it.", ["x"], corpus, [Relevance((0,))]), tmp_path / "a")
    assert np.asarray(load_quadruple(tmp_path / "a").corpus[0]["image"])[0, 0].tolist() == [255, 255, 255]
