"""Saved quadruples come back, and batches follow their rules."""

import json
import os
import pickle
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from datasets import Image as ImageColumn
from datasets import List, Video, load_dataset
from PIL import Image

from q3vl_mini.data import (
    ParquetRows,
    deal,
    load_quadruple,
    main,
    mixed_batches,
    png_bytes,
    save_quadruple,
    video_bytes,
)
from q3vl_mini.emoji_world.scenes import Block, Crop, Film, Page, Placed, Scene, Track
from q3vl_mini.media import MediaBudget, load_image, load_video
from q3vl_mini.records import Clip, Quadruple, Relevance, validate

ROOT = Path(__file__).resolve().parents[1]
EVERY_FRAME = MediaBudget(fps=1000, max_frames=1000)
RNG = np.random.default_rng(0)


@dataclass(frozen=True)
class Flat:
    """A drawing of one colour."""

    colour: tuple[int, int, int]

    def render(self) -> Image.Image:
        return Image.new("RGB", (96, 96), self.colour)


def noise_picture(height: int = 20, width: int = 13) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def noise_clip(n: int = 6, fps: float = 2.0) -> Clip:
    return Clip(RNG.integers(0, 256, (n, 17, 22, 3), dtype=np.uint8), fps)


def texts(n: int, name: str = "words", documents: int | None = None, n_negatives: int = 3) -> Quadruple:
    """n text queries; query i has document i, or i modulo `documents`, and the next ones as negatives."""
    m = documents or n
    relevance = [Relevance((i % m,), tuple((i + j + 1) % m for j in range(min(n_negatives, m - 1)))) for i in range(n)]
    queries, corpus = [{"text": f"q{i}"} for i in range(n)], [{"text": f"d{i}"} for i in range(m)]
    return Quadruple(name, "text_ret", "Find it.", queries, corpus, relevance)


def row_of(instance) -> int:
    return int(instance["text"][1:])


@pytest.fixture
def mixed(tmp_path) -> Quadruple:
    """Every kind of value that an instance may have."""
    file = tmp_path / "picture.png"
    file.write_bytes(png_bytes(noise_picture()))
    queries = [
        {"text": "Καλημέρα\nzwei  Zeilen", "instruction": "Own instruction."},
        {"image": Flat((1, 2, 3)), "text": "with a picture"},
        {"video": noise_clip()},
        "a bare string",
    ]
    corpus = [
        {"image": [Image.fromarray(noise_picture()), noise_picture(9, 9)]},
        {"image": str(file)},
        {"video": [noise_clip(3, 0.5), video_bytes(noise_clip(4, 29.97))]},
        {"video": [noise_picture(), noise_picture(), noise_picture()]},
        {"text": ["one", "two"]},
        {"text": "single", "image": file.read_bytes()},
    ]
    relevance = [
        Relevance((0, 3), (1,), candidates=(0, 1, 3)),
        Relevance((1,), scores=(0.1 + 0.2,)),
        Relevance((2,)),
        Relevance((4,), (0, 5)),
    ]
    meta = {"split": "test", "sizes": (1, (2.5, None)), "licence": "MIT", "truth": ((0, 3), (1,), (2,), (4, 5))}
    return Quadruple("mixed", "image_ret", "Find it: ñ.", queries, corpus, relevance, meta)


def pixels(value, kind):
    """What a model would see of an image or a video: pixels and, of a video, its frames' times."""
    return load_image(value) if kind == "image" else load_video(value, EVERY_FRAME)


def listed(value, kind):
    if kind == "video" and isinstance(value, list) and isinstance(value[0], np.ndarray):
        return [Clip(np.stack(value), 1.0)]  # frames
    return value if isinstance(value, list) else [value]


def assert_same_instances(left, right):
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        a = {"text": a} if isinstance(a, str) else a
        assert set(a) == set(b)
        assert a.get("text") == b.get("text") and a.get("instruction") == b.get("instruction")
        for kind in {"image", "video"} & set(a):
            for x, y in zip(listed(a[kind], kind), listed(b[kind], kind), strict=True):
                x, y = pixels(x, kind), pixels(y, kind)
                if kind == "video":
                    assert x[1] == pytest.approx(y[1], abs=1e-6)
                    x, y = x[0], y[0]
                np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_saved_quadruple_comes_back_pixel_for_pixel(mixed, tmp_path, streaming):
    save_quadruple(mixed, tmp_path / "saved")
    loaded = load_quadruple(tmp_path / "saved", streaming, cache_dir=tmp_path / "cache")
    validate(loaded)
    assert (loaded.name, loaded.task, loaded.instruction) == (mixed.name, mixed.task, mixed.instruction)
    assert loaded.relevance == mixed.relevance
    assert loaded.meta == mixed.meta
    assert_same_instances(mixed.queries, loaded.queries)
    assert_same_instances(mixed.corpus, loaded.corpus)
    assert_same_instances(mixed.corpus[1:6:2], loaded.corpus[1:6:2])
    assert loaded.corpus[-1]["text"] == "single"
    with pytest.raises(IndexError, match="row 6 of 6"):
        loaded.corpus[6]


def test_a_loaded_quadruple_can_be_saved_again(mixed, tmp_path):
    save_quadruple(mixed, tmp_path / "saved")
    save_quadruple(load_quadruple(tmp_path / "saved", streaming=True), tmp_path / "saved")  # over itself
    again = load_quadruple(tmp_path / "saved", streaming=True)
    assert_same_instances(mixed.corpus, again.corpus)
    assert again.relevance == mixed.relevance
    assert sorted(p.name for p in tmp_path.iterdir()) == ["picture.png", "saved"]  # nothing temporary is left


def test_scenes_crops_pages_and_films_are_drawn_as_they_are(tmp_path):
    star, sun = Placed("2b50", "noto"), Placed("2600", "twemoji", 0.3, 0.3, 0.4, "blue")
    scene = Scene((star, sun), "pink", "dotted", 64)
    page = Page("Report", (Block("words", ("some words",)),))
    film = Film((Track(sun, "right"),), "blue", "plain", 48, seconds=3.0, fps=3.0)
    corpus = [{"image": scene}, {"image": Crop(scene, 0.3, 0.3)}, {"image": page}, {"video": film}]
    quadruple = Quadruple("drawn", "image_ret", "Find it.", [{"text": "x"}], corpus, [Relevance((0,))])
    save_quadruple(quadruple, tmp_path / "drawn")
    loaded = load_quadruple(tmp_path / "drawn", streaming=True)
    np.testing.assert_array_equal(np.asarray(loaded.corpus[0]["image"]), scene.array())
    assert_same_instances(corpus, loaded.corpus)


@pytest.mark.parametrize("fps", [0.3, 1.0, 2.0, 7.5, 24.0, 29.97, 30000 / 1001])
def test_a_clip_is_stored_without_loss_at_its_rate(fps):
    clip = noise_clip(5, fps)
    frames, times = load_video(video_bytes(clip), EVERY_FRAME)
    np.testing.assert_array_equal(frames[:5], clip.frames)
    assert times[0] == pytest.approx(0.5 / fps, rel=1e-4)


def test_frames_of_several_sizes_are_refused_with_the_row(tmp_path):
    corpus = [{"text": "fine"}, {"video": [noise_picture(8, 8), noise_picture(9, 9)]}]
    quadruple = Quadruple("bad", "video_ret", "Find it.", [{"text": "x"}], corpus, [Relevance((0,))])
    with pytest.raises(ValueError, match="bad, document 1, video"):
        save_quadruple(quadruple, tmp_path / "bad")
    assert list(tmp_path.iterdir()) == []  # not even half a folder


def test_an_unreadable_file_is_refused_with_the_row(tmp_path):
    queries = [{"image": b"no picture"}]
    quadruple = Quadruple("bad", "image_ret", "Find it.", queries, [{"text": "x"}], [Relevance((0,))])
    with pytest.raises(ValueError, match="bad, query 0, image"):
        save_quadruple(quadruple, tmp_path / "bad")


def test_the_files_are_readable_by_datasets_alone_with_real_columns(mixed, tmp_path):
    save_quadruple(mixed, tmp_path / "saved")
    files = {part: str(tmp_path / "saved" / f"{part}.parquet") for part in ("queries", "corpus")}
    rows = {
        part: load_dataset("parquet", data_files=file, split="train", cache_dir=str(tmp_path / "cache"))
        for part, file in files.items()
    }
    assert rows["queries"].features["image"] == ImageColumn()
    assert rows["queries"].features["video"] == Video(decode=False)
    assert rows["corpus"].features["image"] == List(ImageColumn())
    assert rows["corpus"]["id"][:2] == ["d0", "d1"]
    assert rows["queries"][1]["image"].getpixel((0, 0)) == (1, 2, 3)
    streamed = load_dataset("parquet", data_files=files["queries"], split="train", streaming=True)
    assert [row["text"] for row in streamed][3] == "a bare string"
    card = json.loads((tmp_path / "saved" / "card.json").read_text(encoding="utf-8"))
    assert (card["n_queries"], card["n_documents"], card["licence"]) == (4, 6, "MIT")
    assert "truth" not in card["meta"]  # as many rows as queries: with the labels, not in the card


def test_a_streamed_sequence_holds_one_row_group_and_travels_to_another_process(tmp_path):
    save_quadruple(texts(200), tmp_path / "saved")
    loaded = load_quadruple(tmp_path / "saved", streaming=True)
    rows = loaded.queries.rows
    assert isinstance(rows, ParquetRows) and rows.table is None  # nothing read yet
    assert [row_of(q) for q in loaded.queries] == list(range(200))
    assert rows.table.num_rows < 100
    assert row_of(pickle.loads(pickle.dumps(loaded.queries))[150]) == 150


def test_a_folder_of_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="not a saved quadruple"):
        save_quadruple(texts(3), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_loading_names_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"card\.json"):
        load_quadruple(tmp_path)
    save_quadruple(texts(5), tmp_path / "five")
    save_quadruple(texts(3), tmp_path / "three")
    (tmp_path / "three" / "corpus.parquet").replace(tmp_path / "five" / "corpus.parquet")
    with pytest.raises(ValueError, match="words, query 'q0'.*lacks 'd3'"):
        load_quadruple(tmp_path / "five")


def batches(quadruples, **options):
    defaults = dict(batch_size=8, n_negatives=2, steps=40, seed=3)
    return list(mixed_batches(quadruples, **(defaults | options)))


def test_sub_datasets_are_drawn_in_proportion_to_a_power_of_their_size():
    sizes, steps = {"a": 10, "b": 40, "c": 90}, 3000
    for exponent, shares in ((0.5, (1 / 6, 2 / 6, 3 / 6)), (1.0, (1 / 14, 4 / 14, 9 / 14)), (0.0, (1 / 3,) * 3)):
        quadruples = [texts(n, name) for name, n in sizes.items()]
        drawn = Counter(b.name for b in batches(quadruples, batch_size=50, steps=steps, exponent=exponent))
        expected = np.array(shares) * steps
        found = np.array([drawn[name] for name in sizes])
        assert ((found - expected) ** 2 / expected).sum() < 13.8  # chi-square, 2 degrees of freedom: 1 in 1000
        wrong = np.roll(expected, 1) if exponent else expected * [1.2, 0.9, 0.9]
        assert ((found - wrong) ** 2 / wrong).sum() > 13.8


def test_a_batch_is_of_one_sub_dataset_and_its_parts_belong_together():
    for batch in batches([texts(20, "a"), texts(50, "b")]):
        assert batch.instruction == "Find it." and batch.task == "text_ret"
        assert len(batch.queries) == len(batch.positives) == len(batch.negatives) <= 8
        assert [row_of(p) for p in batch.positives] == batch.positive_ids == [row_of(q) for q in batch.queries]
        assert [[row_of(d) for d in n] for n in batch.negatives] == batch.negative_ids
        n = {"a": 20, "b": 50}[batch.name]
        for row, negatives in zip(batch.positive_ids, batch.negative_ids, strict=True):
            assert len(set(negatives)) == 2 and set(negatives) <= {(row + j) % n for j in (1, 2, 3)}
        assert batch.scores is None and batch.teacher is None


def test_every_query_is_seen_once_an_epoch_in_a_new_order():
    found = batches([texts(30)], batch_size=8, steps=12)  # three epochs of four batches
    epochs = [[row_of(q) for b in found[start : start + 4] for q in b.queries] for start in (0, 4, 8)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(30))
    assert epochs[0] != epochs[1] != epochs[2]
    assert sorted(len(b.queries) for b in found[:4]) == [7, 7, 8, 8]


def test_a_small_sub_dataset_gives_small_batches():
    assert {len(b.queries) for b in batches([texts(5)], batch_size=64)} == {5}


def test_a_batch_depends_on_seed_and_number_alone():
    quadruples = [texts(20, "a"), texts(50, "b", documents=10)]
    whole = batches(quadruples)
    assert batches(quadruples, start=17) == whole[17:]  # resumed
    assert batches(quadruples, steps=60)[:40] == whole  # trained for longer
    assert batches(quadruples, seed=4) != whole


def test_batches_are_the_same_in_another_process():
    code = (
        "from tests.test_data import batches, texts\n"
        "print([(b.name, b.positive_ids, b.negative_ids) for b in batches([texts(20, 'a'), texts(50, 'b')], start=30)])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    here = [(b.name, b.positive_ids, b.negative_ids) for b in batches([texts(20, "a"), texts(50, "b")], start=30)]
    assert result.stdout.strip().splitlines()[-1] == str(here)


def test_a_document_is_not_twice_in_a_batch_where_that_is_possible():
    shared = texts(64, documents=16)  # four queries a document, eight batches of eight
    for batch in batches([shared], steps=16):
        assert len(set(batch.positive_ids)) == len(batch.positive_ids)
    order = np.random.default_rng(0).permutation(64)  # what a plain permutation does
    assert any(len({row % 16 for row in order[i : i + 8]}) < 8 for i in range(0, 64, 8))


def test_a_document_of_too_many_queries_is_spread_evenly():
    dealt = deal(texts(60, documents=3).relevance, 12, np.random.default_rng(0))  # five batches of 12, 3 documents
    for cards in dealt:
        assert sorted(Counter(row % 3 for row, _ in cards).values()) == [4, 4, 4]


def test_one_of_several_positives_is_drawn_anew_each_epoch():
    several = replace(texts(6), relevance=[Relevance((i, (i + 1) % 6, (i + 2) % 6)) for i in range(6)])
    seen = defaultdict(Counter)
    for batch in batches([several], steps=300):
        assert all(n == [] for n in batch.negatives)  # none is labelled
        for query, document in zip(batch.queries, batch.positive_ids, strict=True):
            seen[row_of(query)][document] += 1
    for row, counts in seen.items():
        assert set(counts) == {row, (row + 1) % 6, (row + 2) % 6}
        assert min(counts.values()) > 60  # of 300, 100 expected


def test_negatives_are_ragged_and_change_from_epoch_to_epoch():
    quadruple = texts(10)
    ragged = [Relevance((i,), tuple(j for j in range(i) if j != i)) for i in range(10)]
    found = batches([replace(quadruple, relevance=ragged)], batch_size=10, n_negatives=4, steps=20)
    for batch in found:
        for row, negatives in zip(batch.positive_ids, batch.negative_ids, strict=True):
            assert len(negatives) == len(set(negatives)) == min(row, 4)
    last = {tuple(sorted(b.negative_ids[b.positive_ids.index(9)])) for b in found}
    assert len(last) > 5


def test_random_negatives_come_from_the_whole_corpus_and_never_from_the_labels():
    quadruple = texts(12)
    labelled = [Relevance((i, (i + 1) % 12), ((i + 2) % 12,)) for i in range(12)]
    seen = Counter()
    for batch in batches([replace(quadruple, relevance=labelled)], n_negatives=1, n_random=3, steps=60):
        for query, negatives in zip(batch.queries, batch.negative_ids, strict=True):
            row = row_of(query)
            assert negatives[0] == (row + 2) % 12 and len(negatives) == len(set(negatives)) == 4
            assert not set(negatives) & {row, (row + 1) % 12}
            seen.update((document - row) % 12 for document in negatives[1:])
    assert set(seen) == set(range(3, 12)) and max(seen.values()) < 2 * min(seen.values())
    few = batches([texts(3)], n_negatives=0, n_random=9)  # a corpus of three has two others
    assert all(len(negatives) == 2 for batch in few for negatives in batch.negative_ids)


def test_graded_labels_travel_with_their_pair():
    quadruple = texts(6)
    graded = [Relevance((i, (i + 1) % 6), scores=(i / 10, i / 10 + 0.05)) for i in range(6)]
    for batch in batches([replace(quadruple, relevance=graded)]):
        for query, document, score in zip(batch.queries, batch.positive_ids, batch.scores, strict=True):
            row = row_of(query)
            assert score == (row / 10 if document == row else row / 10 + 0.05)


def test_the_teachers_logits_are_of_the_positive_and_the_negatives():
    quadruple = texts(12)
    logits = {i: {d: 100 * i + d for d in (i, (i + 1) % 12, (i + 2) % 12)} for i in range(12)}  # not of negative i + 3
    for batch in batches([quadruple, texts(9, "other")], n_negatives=3, teacher={"words": logits}):
        if batch.name == "other":
            assert batch.teacher is None
            continue
        rows = [row_of(query) for query in batch.queries]
        for i, p, n, those in zip(rows, batch.positive_ids, batch.negative_ids, batch.teacher, strict=True):
            assert sorted(n) == sorted({(i + 1) % 12, (i + 2) % 12})
            assert those == [100 * i + d for d in (p, *n)]


def test_faulty_arguments_are_named():
    with pytest.raises(ValueError, match="with a name of its own"):
        mixed_batches([texts(3), texts(4)], batch_size=2, n_negatives=1, steps=1, seed=0)  # at once, not at next()
    with pytest.raises(ValueError, match="start 9, steps 4"):
        batches([texts(3)], start=9, steps=4)
    with pytest.raises(ValueError, match="n_random with a teacher"):
        batches([texts(3)], n_random=1, teacher={"words": {}})
    with pytest.raises(ValueError, match="not among the sub-datasets"):
        batches([texts(3)], teacher={"else": {}})
    with pytest.raises(ValueError, match="words, query 1: the teacher scored none of its positives"):
        batches([texts(3)], teacher={"words": {0: {0: 1.0}}})
    half = [Relevance((0,), scores=(1.0,)), Relevance((1,)), Relevance((2,))]
    with pytest.raises(ValueError, match="1 of 3 queries have scores"):
        batches([replace(texts(3), relevance=half)])


def test_the_command_explains_itself(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--split", "--out", "--n ", "--save", "--rows", "--seed"))
    assert "usage: q3vl-mini data" in shown


def test_the_command_saves_a_task_with_noise_and_its_truth(tmp_path, capsys):
    noise = ["--wrong", "0.2", "--duplicates", "0.1", "--n", "40"]
    main(["keyword_search", *noise, "--out", str(tmp_path / "sheet.png"), "--save", str(tmp_path / "noisy")])
    noisy = load_quadruple(tmp_path / "noisy")
    labels = zip(noisy.relevance, noisy.meta["truth"], strict=True)
    assert sum(not set(said.positives) & set(true) for said, true in labels) == 8
    with pytest.raises(SystemExit):
        main(["keyword_search", "--wrong", "2", "--out", str(tmp_path / "sheet.png")])
    assert "noise rates wrong=2.0" in capsys.readouterr().err


def test_a_thinner_corpus_keeps_what_is_named_and_the_labels_point_to_it():
    corpus = [f"document {i}" for i in range(50)]
    labels = [Relevance((40, 7), (3,)), Relevance((12,), candidates=(12, 30, 31))]
    whole = Quadruple("own", "text_ret", "Find.", ["a", "b"], corpus, labels)
    thin = whole.thin(10)

    def named(quadruple):
        rows = [(r.positives, r.negatives, r.candidates or ()) for r in quadruple.relevance]
        return [[[quadruple.corpus[i] for i in part] for part in parts] for parts in rows]

    assert len(thin.corpus) == 10 and set(thin.corpus) < set(corpus) and thin.queries == whole.queries
    assert named(thin) == named(whole) and thin.relevance[0].candidates is None
    assert whole.thin(3).corpus == [corpus[i] for i in (3, 7, 12, 30, 31, 40)]  # what is named stays
    assert whole.thin(99).corpus == corpus
