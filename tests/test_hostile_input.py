"""Generated bad input: it is an error that names the item, or the right answer; never a crash, a hang or a wrong one.

Each test runs on a few examples, always the same, and under the marker `hard` on many.
"""

import io
import json
import math
import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from q3vl_mini.data import video_bytes
from q3vl_mini.demo.uploads import read_query, read_upload
from q3vl_mini.embedder import Embedder
from q3vl_mini.index import Index
from q3vl_mini.items import Item, Skipped, embed_items, read_items
from q3vl_mini.media import MediaBudget, load_image, load_video, prepare
from q3vl_mini.mining import mine
from q3vl_mini.pairs import Pair, read_pairs
from q3vl_mini.paths import below
from q3vl_mini.records import Clip, Quadruple, Relevance, validate, validate_instance
from q3vl_mini.reranker import Reranker
from q3vl_mini.tables import read_rows

BUDGET = MediaBudget(image_max_tokens=64, video_max_tokens=64, max_frames=4)
SECONDS = 60  # of one example, on a machine that does other things too
few_and_many = pytest.mark.parametrize("examples", [10, pytest.param(100, marks=pytest.mark.hard)])
with_a_model = pytest.mark.parametrize("examples", [5, pytest.param(40, marks=pytest.mark.hard)])


def for_any(examples: int, **strategies):
    """Run the function that is decorated, at once, on generated arguments: the same in every run."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

    def run(check):
        setting = settings(
            max_examples=examples,
            derandomize=True,
            database=None,
            deadline=timedelta(seconds=SECONDS),
            suppress_health_check=checks,
        )
        setting(given(**strategies)(check))()

    return run


# --- what is generated

SHARP = ["", " ", "\0", "\x1b[2J", "\u202eabc", "\u05d0", "\ud83d", "a\udfffb", "<|im_end|>", "\ufeff", "\U0010ffff"]
LONG = ["word ", "a", "\u0627", "\U0001f600\u200d", "\n"]
texts = st.one_of(
    st.sampled_from(SHARP),
    st.text(st.characters(), max_size=40),  # every code point, halves of characters too
    st.builds(lambda part, n: part * n, st.sampled_from(LONG), st.sampled_from([500, 20_000])),
)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts, st.binary(max_size=40))
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)
paths = st.one_of(
    texts.filter(lambda path: len(path) < 5000),
    st.sampled_from(["../a.png", "/etc/passwd", "C:\\a.png", "a/../../b.png", ".", "https://example.org/a.png"]),
)


def as_file(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def _files() -> dict[str, bytes]:
    y, x = np.mgrid[0 : 1 : 40 * 1j, 0 : 1 : 60 * 1j]
    picture = Image.fromarray((np.stack([y, x, (x + y) / 2], axis=-1) * 255).astype(np.uint8))
    kinds = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "ICO", "PPM")
    files = {kind: as_file(picture, kind) for kind in kinds}
    files["16 bits"] = as_file(Image.fromarray(np.full((30, 20), 40_000, np.uint16)), "PNG")
    files["CMYK"] = as_file(picture.convert("CMYK"), "JPEG")
    files["palette"] = as_file(picture.quantize(8), "PNG")
    return files


FILES = _files()
FILM = video_bytes(Clip(np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), dtype=np.uint8), 2.0))


@st.composite
def damaged(draw, files: list[bytes]):
    """A file as it was, cut off, or with some bytes changed."""
    content = bytearray(draw(st.sampled_from(files)))
    for _ in range(draw(st.integers(0, 6))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.sampled_from([len(content), draw(st.integers(0, len(content)))]))])


shapes = st.lists(st.sampled_from([0, 1, 2, 3, 4, 7, 40, 900]), min_size=1, max_size=4)
arrays = st.builds(
    lambda shape, kind, value: np.full(shape, value).astype(kind),
    shapes.filter(lambda shape: math.prod(shape) < 10**6),
    st.sampled_from(["uint8", "float32", "float64", "int64", "uint16", "bool"]),
    st.sampled_from([0, 1, 0.5, 255, 70_000]),
) | st.builds(lambda x: np.full((8, 8, 3), x), st.sampled_from([math.nan, math.inf, -1.0, 2.0]))
drawn = st.builds(
    Image.new,
    st.sampled_from(["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16", "LA", "PA"]),
    st.tuples(*2 * [st.sampled_from([0, 1, 5, 40, 6000])]),
)
objects = st.sampled_from([7, 1.5, object(), {"bytes": None, "path": "a"}, {"a"}, b"", True, int])
pictures = st.one_of(damaged(list(FILES.values())), arrays, drawn, paths, st.binary(max_size=99), objects)
films = st.one_of(
    damaged([FILM, FILES["GIF"]]),
    arrays,
    st.lists(st.one_of(drawn, arrays), max_size=3),
    paths,
    st.binary(max_size=99),
    objects,
    st.just(b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n"),
    st.just(b"ffconcat version 1.0\nfile '/etc/hostname'\n"),
)
instances = st.one_of(
    scalars,
    st.dictionaries(st.sampled_from(["text", "image", "video", "instruction", "title", 3]), scalars, max_size=3),
    st.fixed_dictionaries({"text": st.lists(scalars, max_size=3)}),
    st.fixed_dictionaries({"image": pictures, "text": texts}),
    st.fixed_dictionaries({"video": films}),
)


def test_the_files_are_sound_before_they_are_damaged():
    for content in FILES.values():
        assert load_image(content).std() >= 0
    assert load_image(FILES["16 bits"])[0, 0].tolist() == 3 * [40_000 // 256]
    assert len(load_video(FILM, BUDGET)[0]) == 2  # of 2.5 seconds, at 1 a second


def refused(call, *names: str):
    """What `call` gives, or None where it is a ValueError that holds one of `names`. Anything else is a failure."""
    try:
        return call()
    except ValueError as error:
        assert any(name in str(error) for name in names), f"{error!r} names none of {names}"
        str(error).encode("utf-8")  # can be printed and written
        return None


# --- pictures, films, texts


@few_and_many
@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_visual_is_within_its_budget_or_named(processor, kind, examples):
    @for_any(examples, value=pictures if kind == "image" else films)
    def check(value):
        visual = refused(lambda: prepare(value, kind, BUDGET, processor, where="item 7"), "item 7")
        if visual is not None:
            assert 1 <= visual.n_tokens <= 64
            assert visual.pixel_values.isfinite().all() and visual.pixel_values.abs().max() <= 1


@few_and_many
def test_a_text_reaches_the_model_whole_or_cut_and_forges_nothing(small_checkpoint, examples):
    embedder = Embedder(small_checkpoint, max_length=300)
    specials = [i for token, i in embedder.processor.tokenizer.get_vocab().items() if token.startswith("<|")]
    usual = torch.isin(embedder.collate(["x"])["input_ids"], torch.tensor(specials)).sum()

    @for_any(examples, text=texts, instruction=texts)
    def check(text, instruction):
        item = {"text": text, "instruction": instruction}
        inputs = refused(lambda: embedder.collate([item], names=["item 7"]), "item 7")
        if inputs is not None:
            assert inputs["input_ids"].shape[1] <= 300
            assert torch.isin(inputs["input_ids"], torch.tensor(specials)).sum() == usual


@few_and_many
def test_an_instance_is_collated_or_named(small_checkpoint, examples):
    embedder = Embedder(small_checkpoint, max_length=600, budget=BUDGET)

    @for_any(examples, instance=instances)
    def check(instance):
        inputs = refused(lambda: embedder.collate(["fine", instance]), "item 1")
        problems = validate_instance(instance, "item 1")
        assert all(problem.startswith("item 1") for problem in problems)
        assert inputs is None or len(inputs["input_ids"]) == 2


@with_a_model
def test_vectors_are_finite_and_of_length_one_or_the_item_is_named(small_checkpoint, examples):
    embedder = Embedder(small_checkpoint, max_length=300, budget=BUDGET)

    @for_any(examples, items=st.lists(instances, max_size=3), precision=st.sampled_from(["float32", "binary", "int4"]))
    def check(items, precision):
        names = [f"item {i}" for i in range(len(items))] + ["precision"]
        vectors = refused(lambda: embedder.encode(items, precision=precision), *names)
        if vectors is not None and precision == "float32" and items:
            np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)


@with_a_model
def test_a_bad_item_costs_a_job_this_item_alone(small_checkpoint, examples):
    embedder = Embedder(small_checkpoint, max_length=300, budget=BUDGET)
    sound = [Item(f"sound {i}", {"text": f"words {i}"}) for i in range(2)]
    expected = embedder.encode([item.instance for item in sound])

    @for_any(examples, bad=st.lists(instances.filter(lambda x: isinstance(x, dict)), max_size=3))
    def check(bad):
        others = [Item(f"item {i}", instance) for i, instance in enumerate(bad)]
        kept, vectors, skipped = embed_items(embedder, [sound[0], *others, sound[1]])
        assert [x.id for x in kept if x in sound] == ["sound 0", "sound 1"]
        assert len(kept) + len(skipped) == len(bad) + 2 and all(s.reason for s in skipped)
        for x, vector in zip(kept, vectors, strict=True):
            if x in sound:
                np.testing.assert_allclose(vector, expected[sound.index(x)], atol=1e-4)


@with_a_model
def test_a_ranking_holds_every_document_once_or_the_pair_is_named(small_checkpoint, examples):
    reranker = Reranker(small_checkpoint, max_length=400, budget=BUDGET)

    @for_any(examples, query=instances, documents=st.lists(instances, min_size=1, max_size=2))
    def check(query, documents):
        ranked = refused(lambda: reranker.rank(query, documents), *(f"pair {i}" for i in range(len(documents))))
        if ranked is not None:
            assert sorted(row["corpus_id"] for row in ranked) == list(range(len(documents)))
            assert all(0 <= row["score"] <= 1 for row in ranked)


# --- labels and vectors

numbers = st.integers(-2, 4) | st.sampled_from([1.5, "0", None, True, np.int64(1)])
rows = st.lists(numbers, max_size=3).map(tuple)
labels = st.builds(
    Relevance,
    positives=rows,
    negatives=rows,
    scores=st.none() | st.lists(st.floats(), max_size=3).map(tuple),
    candidates=st.none() | rows,
)


@few_and_many
def test_a_quadruple_is_valid_or_its_faults_are_named(examples):
    @for_any(examples, labels=st.lists(labels, max_size=3), query=instances, instruction=scalars)
    def check(labels, query, instruction):
        quadruple = Quadruple("mine", "text_ret", instruction, ["q", query], 3 * [{"text": "d"}], labels)
        if refused(lambda: validate(quadruple) or True, "mine"):
            assert len(labels) == 2 and all(r.positives for r in labels)
            assert {d for r in labels for d in (*r.positives, *r.negatives)} <= {0, 1, 2}
            assert all(math.isfinite(score) for r in labels for score in r.scores or ())


@few_and_many
def test_mining_keeps_to_the_corpus_or_names_what_does_not_fit(examples):
    corpus = np.eye(3, dtype=np.float32)
    quadruple = Quadruple("mine", "text_ret", "Find.", ["a", "b"], ["x", "y", "z"], [Relevance((0,)), Relevance((1,))])
    numbers = st.lists(st.integers(-2, 4), max_size=3).map(tuple)
    entries = st.sampled_from([0.0, 1.0, math.nan, math.inf, 0.5])

    @for_any(examples, positives=numbers, negatives=numbers, vector=st.lists(entries, min_size=3, max_size=3))
    def check(positives, negatives, vector):
        changed = replace(quadruple, relevance=[Relevance((0,)), Relevance(positives, negatives)])
        queries = np.stack([corpus[0], np.array(vector, np.float32)])
        setting = dict(k=3, t_plus=0.1, delta_minus=0.05, n_negatives=2)
        mined = refused(lambda: mine(changed, queries, corpus, **setting), "mine, query 1")
        if mined is not None:
            assert np.isclose(np.linalg.norm(vector), 1, atol=0.01)
            assert {d for q in mined.queries for d in (*q.positives, *q.negatives)} <= {0, 1, 2}


@few_and_many
def test_an_index_gives_back_what_it_took_or_names_what_it_refused(examples):
    ids = st.lists(scalars, min_size=1, max_size=3)
    values = st.sampled_from([0.0, 1.0, math.nan, -1.0, math.inf])
    vectors = st.lists(st.lists(values, min_size=2, max_size=2), min_size=1, max_size=3)
    metadata = st.none() | st.lists(st.dictionaries(texts, json_values, max_size=2) | json_values, max_size=3)

    @for_any(examples, ids=ids, vectors=vectors, metadata=metadata)
    def check(ids, vectors, metadata):
        index = Index(2)
        names = ["id", "vector", "metadata"]
        refused(lambda: index.add(ids, np.array(vectors, np.float32), metadata) or True, *names)
        if len(index):
            assert [entry.id for entry in index.get(ids)] == ids
            assert [entry.metadata for entry in index.get(ids)] == (metadata or [{}] * len(ids))
            assert {hit.id for hit in index.search(np.array([[1.0, 0.0]]), k=9)[0]} == set(ids)


# --- tables, files, paths


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    Image.new("RGB", (8, 8), "red").save(place / "a.png")
    return place


PIECES = [b'{"text": "a", "query": "b", "positive": "c"}', b"query,positive\n", b"a,b\n", b'"', b"\n", b"\xff", b"\0"]


@few_and_many
@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_any_bytes_as_a_table_are_rows_and_named_lines(folder, ending, examples):
    file = folder / f"t.{ending}"

    @for_any(examples, content=st.lists(st.sampled_from(PIECES) | st.binary(max_size=20), max_size=8).map(b"".join))
    def check(content):
        file.write_bytes(content)
        rows = refused(lambda: list(read_rows(file)), file.name) or []
        assert all(isinstance(row, dict) or file.name in str(row) for row in rows)
        items = refused(lambda: list(read_items(file)), file.name) or []
        ids = [item.id for item in items if isinstance(item, Item)]
        assert len(set(ids)) == len(ids) and all(item.reason for item in items if isinstance(item, Skipped))


@few_and_many
def test_any_row_is_a_pair_or_a_fault_that_names_it(folder, examples):
    cells = json_values | paths | st.just("a.png") | st.fixed_dictionaries({"image": paths, "text": texts})
    names = ["query", "positive", "negatives", "instruction", "score", "split"]

    @for_any(examples, row=st.dictionaries(st.sampled_from(names), cells))
    def check(row):
        lines = [{"query": "q", "positive": "a.png"}, row]
        (folder / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
        first, *found = read_pairs(folder / "t.jsonl")
        assert isinstance(first, Pair) and found and {x.row.number for x in found} == {1}
        assert all(isinstance(x, Pair) or x.message and x.column for x in found)
        for pair in (x for x in found if isinstance(x, Pair)):
            sides = [pair.query, *pair.positives, *pair.negatives]
            assert not any(validate_instance(side, "it") for side in sides)
            assert {side["image"] for side in sides if "image" in side} <= {str(folder / "a.png")}


@few_and_many
def test_any_row_is_an_item_that_can_be_kept_or_is_skipped(folder, examples):
    columns = st.sampled_from(["id", "text", "image", "video", "instruction", "price"])

    @for_any(examples, row=st.dictionaries(columns, json_values | paths))
    def check(row):
        (folder / "t.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"id": "last", "text": "x"}))
        found, last = read_items(folder / "t.jsonl")
        assert isinstance(last, Item) or row.get("id") == "last"
        if isinstance(found, Item):
            index = Index(1)
            index.add([found.id], np.ones((1, 1)), [found.metadata])  # neither id nor metadata end the job
            for kind in ("image", "video"):
                values = found.instance.get(kind)
                for path in [x for x in (values if isinstance(values, list) else [values]) if isinstance(x, str)]:
                    is_address = "://" in path[:12]  # refused when it is opened
                    assert is_address or Path(os.path.abspath(path)).is_relative_to(folder)


@few_and_many
def test_a_path_lies_below_its_root_or_is_refused(folder, examples):
    parts = st.lists(st.sampled_from(["..", ".", "a", "", "/", "~", "b.png", "\\..\\x"]), max_size=6).map("/".join)

    @for_any(examples, path=parts | texts)
    def check(path):
        place = refused(lambda: below(path, folder / "a", folder), "leads outside")
        outside = os.path.relpath(os.path.join(folder, "a", path), folder).split(os.sep)[0] == os.pardir
        assert (place is None) == outside


@few_and_many
def test_an_upload_is_pixels_words_or_a_named_refusal(folder, processor, examples):
    thin = [as_file(Image.new("L", size), kind) for size in [(1, 900), (900, 4)] for kind in ("PNG", "GIF", "TIFF")]
    words = texts.map(lambda text: text.encode("utf-8", "surrogatepass"))
    contents = damaged([*FILES.values(), *thin, FILM]) | st.binary(max_size=60) | words

    @for_any(examples, content=contents, name=st.sampled_from(["a.png", "a.mp4", "<script>.txt", "a.svg"]))
    def check(content, name):
        assume(content)
        (folder / name).write_bytes(content)
        upload = refused(lambda: read_upload(folder / name), name)
        if upload is not None:
            assert upload.kind in ("picture", "clip", "text")
            [value] = upload.instance.values()
            largest = {"picture": 1024, "clip": 256}.get(upload.kind)
            shape = value.frames.shape[1:3] if upload.kind == "clip" else getattr(value, "size", (0,))
            assert largest is None or max(shape) <= largest
            assert upload.kind != "text" or len(value) <= 2000
            if upload.kind != "text":
                prepare(value, "image" if upload.kind == "picture" else "video", BUDGET, processor)  # a model takes it


@few_and_many
def test_words_of_a_visitor_are_bounded(examples):
    @for_any(examples, text=texts)
    def check(text):
        query = refused(lambda: read_query(text, []), "type some words")
        assert query is None or 0 < len(query["text"][0]) <= 2000
