"""The demo without a browser: gallery, vectors on disk, search and its costs, uploads, collections, what is escaped."""

import io
import json
import re
import runpy
import shutil
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import yaml
from PIL import Image
from sklearn.decomposition import PCA

from q3vl_mini import stores
from q3vl_mini.choices import PRECISIONS
from q3vl_mini.cli import main
from q3vl_mini.compression import truncate
from q3vl_mini.data import video_bytes
from q3vl_mini.demo import markup, uploads
from q3vl_mini.demo.app import build
from q3vl_mini.demo.collections import Collections, files_below
from q3vl_mini.demo.engine import Engine, Result, Settings
from q3vl_mini.demo.examples import examples
from q3vl_mini.demo.gallery import gallery, make_gallery, scene_title
from q3vl_mini.demo.items import Item, model_view, thumbnail
from q3vl_mini.demo.models import TIDIED, Models
from q3vl_mini.demo.page import GALLERY, Page
from q3vl_mini.demo.shelf import BATCH, Shelf
from q3vl_mini.demo.uploads import read_query, read_upload
from q3vl_mini.embedder import Embedder
from q3vl_mini.emoji_world.scenes import Placed, Scene
from q3vl_mini.emoji_world.sprites import STYLES, TEST_STYLES
from q3vl_mini.index import Index
from q3vl_mini.media import MediaBudget, load_image, load_video
from q3vl_mini.records import Clip
from q3vl_mini.stores import LanceStore, open_store

ROOT = Path(__file__).resolve().parents[1]
QUERY = {"text": "a picture of a bicycle"}


@pytest.fixture(scope="module")
def models():
    return Models(["raw", "s1"])


@pytest.fixture(scope="module")
def items():
    return make_gallery(14, 3, 2, 2)


@pytest.fixture(scope="module")
def shelf(items, tmp_path_factory):
    return Shelf("Gallery", items, tmp_path_factory.mktemp("gallery"))


@pytest.fixture(scope="module")
def engine(models):
    return Engine(models)


def png(path: Path, colour: str = "red", size: tuple[int, int] = (40, 30)) -> Path:
    Image.new("RGB", size, colour).save(path, "PNG")
    return path


# --- the gallery


def test_the_gallery_is_the_same_each_time_and_in_unseen_styles_alone(items):
    again = make_gallery(14, 3, 2, 2)
    assert [(x.id, x.title, x.instance) for x in items] == [(x.id, x.title, x.instance) for x in again]
    assert [x.kind for x in items] == ["picture"] * 14 + ["scene"] * 3 + ["clip"] * 2 + ["page"] * 2
    assert len({x.id for x in items}) == len(items)
    drawn = repr([x.instance for x in items])
    assert {style for style in STYLES if f"'{style}'" in drawn} == set(TEST_STYLES)


def test_titles_say_what_is_drawn():
    cat, apple = Placed("1f408", "noto", 0.25, 0.25, 0.4), Placed("1f34e", "noto", 0.75, 0.75, 0.4, "blue")
    assert scene_title(Scene((cat,))) == "cat"
    assert scene_title(Scene((cat, cat))) == "two times cat"
    assert scene_title(Scene((cat, apple))) == "a cat at the top left, a blue red apple at the bottom right"


def test_every_example_names_what_the_full_gallery_has():
    shown = examples(make_gallery())
    assert len({x.label for x in shown}) == len(shown) >= 10
    assert sum("(" in x.label for x in shown) >= 5, "several languages"
    assert any(x.picture and x.text for x in shown) and any(x.picture and not x.text for x in shown)
    assert any("page" in x.label for x in shown)


def test_pictures_for_the_page_move_where_the_item_does(items):
    for item in items:
        frames = Image.open(io.BytesIO(thumbnail(item))).n_frames
        assert (frames > 1) == (item.kind == "clip") or "stays still" in item.title
        assert max(Image.open(io.BytesIO(thumbnail(item, 48))).size) == 48
    assert thumbnail(Item("t", "text", "words", {"text": "words"})) is None


def test_an_item_as_a_query_is_what_the_models_saw(items, tmp_path):
    for item in (items[0], *(x for x in items if x.kind == "clip")):
        file = tmp_path / "query.webp"
        file.write_bytes(model_view(item))
        upload = read_upload(file)
        if item.kind == "clip" and upload.kind == "clip":
            frames = load_video(item.instance["video"], MediaBudget(fps=2.0))[0]
            np.testing.assert_array_equal(upload.instance["video"].frames, frames)
        else:
            np.testing.assert_array_equal(load_image(upload.instance["image"]), load_image(item.instance["image"]))


# --- models


def test_models_that_share_weights_give_the_vectors_of_models_by_themselves(models):
    texts = ["a cat", "12 apples"]
    alone = {name: Embedder(models.paths[name]).encode(texts) for name in models.names}
    assert np.abs(alone["raw"] - alone["s1"]).max() > 0.05
    for name in ("s1", "raw", "s1"):
        with models.reranker():
            pass
        with models.embedder(name) as embedder:
            np.testing.assert_allclose(embedder.encode(texts), alone[name], atol=1e-5)
    with pytest.raises(ValueError, match=r"no model 's9'; choose one of \['raw', 's1'\]"), models.embedder("s9"):
        pass


def test_a_checkpoint_of_the_other_role_is_refused():
    with pytest.raises(ValueError, match="role 'reranker', not 'embedder'"), Models(["reranker"]).embedder("reranker"):
        pass


# --- vectors on disk


def test_what_answers_left_in_pieces_goes_back_to_the_system_now_and_then(models, monkeypatch):
    returned = []
    monkeypatch.setattr("q3vl_mini.demo.models.give_back_freed", lambda: returned.append(1))
    for _ in range(2 * TIDIED):
        with models.embedder("raw"):
            pass
    assert len(returned) == 2


def test_vectors_are_computed_once_for_each_model(models, shelf, items):
    first = shelf.vectors(models, "s1")
    with models.embedder("s1") as embedder:
        np.testing.assert_allclose(first, embedder.encode([x.instance for x in items]), atol=1e-5)
    reopened = Shelf("Gallery", items, shelf.folder)
    assert list(reopened.embed(models, "s1")) == []
    np.testing.assert_array_equal(reopened.vectors(models, "s1"), first)
    assert np.abs(reopened.vectors(models, "raw") - first).max() > 0.05


def test_shipped_vectors_are_taken_for_their_own_model_alone(models, shelf, items, tmp_path):
    exact = shelf.vectors(models, "s1")
    shelf.ship(models, "s1", tmp_path / "shipped")
    other = Shelf("Gallery", items, tmp_path / "home", tmp_path / "shipped")
    assert list(other.embed(models, "s1")) == []  # nothing is left to make
    vectors = other.vectors(models, "s1")
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert (vectors * exact).sum(axis=1).min() > 0.9995
    np.testing.assert_array_equal(vectors > 0, exact > 0)  # the binary codes
    assert next(other.embed(models, "raw")) == (BATCH, len(items))
    more = Shelf("Gallery", [*items, Item("new", "text", "new", {"text": "new"})], tmp_path / "more", other.shipped)
    assert list(more.embed(models, "s1")) == [(len(items) + 1, len(items) + 1)]


def test_the_gallerys_shipped_vectors_are_those_of_the_shipped_model(tmp_path):
    """Where it fails: python scripts/ship_models.py"""
    models, shelf = Models(), gallery(tmp_path)
    [name] = models.names[-1:]
    assert list(shelf.embed(models, name)) == []
    few = [row for kind in ("picture", "scene", "clip", "page") for row in rows_of_kind(shelf, kind)[:2]]
    with models.embedder(name) as embedder:
        made = embedder.encode([shelf.items[row].instance for row in few])
    assert (shelf.vectors(models, name)[few] * made).sum(axis=1).min() > 0.999


def rows_of_kind(shelf, kind) -> list[int]:
    return [row for row, item in enumerate(shelf.items) if item.kind == kind]


def test_who_stops_in_the_middle_keeps_what_is_done(models, items, tmp_path):
    steps = Shelf("x", items, tmp_path).embed(models, "s1")
    assert next(steps) == (BATCH, len(items))
    steps.close()
    assert list(Shelf("x", items, tmp_path).embed(models, "s1")) == [(len(items), len(items))]


# --- search


def brute_force(models, shelf, query, instruction, dim):
    """Ids by falling cosine and the cosines, one by one."""
    with models.embedder("s1") as embedder:
        q = truncate(embedder.encode([query], instruction or None), dim)[0]
        documents = truncate(embedder.encode([x.instance for x in shelf.items]), dim)
    cosines = [sum(float(a) * float(b) for a, b in zip(q, d, strict=True)) for d in documents]
    order = sorted(range(len(cosines)), key=lambda i: -cosines[i])
    return [shelf.items[i].id for i in order], [cosines[i] for i in order]


@pytest.mark.parametrize("dim, instruction", [(0, ""), (64, "Find the picture that matches the text.")])
def test_results_are_the_nearest_items(engine, models, shelf, dim, instruction):
    answer = engine.search(shelf, QUERY, Settings("s1", dim, instruction=instruction, k=5))
    ids, cosines = brute_force(models, shelf, QUERY, instruction, dim or 256)
    assert [x.item.id for x in answer.results] == ids[:5]
    np.testing.assert_allclose([x.score for x in answer.results], cosines[:5], atol=1e-4)
    assert [x.found_at for x in answer.results] == [1, 2, 3, 4, 5]
    assert list(answer.ms) == ["collate", "embed", "search"] and min(answer.ms.values()) > 0


def test_an_image_and_words_are_searched_together(engine, shelf, items):
    mixed = engine.search(shelf, {"image": items[0].instance["image"], "text": "in red"}, Settings("s1", k=3))
    image = engine.search(shelf, {"image": items[0].instance["image"]}, Settings("s1", k=3))
    assert image.results[0].item is items[0] and image.results[0].score == pytest.approx(1, abs=1e-3)
    assert mixed.results[0].score < 0.999


def test_fewer_bits_are_smaller_and_rescoring_brings_the_cosine_back(engine, models, shelf):
    n, exact = len(shelf), dict(zip(*brute_force(models, shelf, QUERY, "", 64), strict=True))
    for precision in PRECISIONS:
        rough = engine.search(shelf, QUERY, Settings("s1", 64, precision, rescore=False, k=5))
        assert rough.bytes_scanned == {"float32": 4 * 64 * n, "int8": 64 * n, "binary": 8 * n}
        assert "rescore" not in rough.ms and rough.bytes_kept == 4 * 64 * n
        assert "kept to rescore by" not in markup.cost(rough)
        rescored = engine.search(shelf, QUERY, Settings("s1", 64, precision, rescore=True, k=5))
        assert ("rescore" in rescored.ms) == ("kept to rescore by" in markup.cost(rescored)) == (precision != "float32")
        for result in rescored.results:
            assert result.score == pytest.approx(exact[result.item.id], abs=1e-4)
    signs = {x.item.id: x.score for x in rough.results}
    assert all(x * 32 == int(x * 32) for x in signs.values()), "1 - 2 * differing bits / 64"
    with pytest.raises(ValueError, match=r"'binary' at 60 dimensions; choose one of \['float32', 'int8'\]"):
        engine.search(shelf, QUERY, Settings("s1", 60, "binary"))


def test_a_kind_can_be_searched_alone(engine, shelf):
    answer = engine.search(shelf, QUERY, Settings("s1", kinds=("clip", "page")))
    assert answer.n_items == len(answer.results) == 4
    assert {x.item.kind for x in answer.results} == {"clip", "page"}


def test_the_reranker_orders_the_first_results_and_says_where_they_were(engine, models, shelf):
    plain = engine.search(shelf, QUERY, Settings("s1", k=20))
    reranked = engine.search(shelf, QUERY, Settings("s1", k=20, rerank=True))
    first = plain.results[:16]
    with models.reranker() as reranker:
        scores = reranker.score(QUERY, [x.item.instance for x in first])
    order = sorted(range(16), key=lambda i: -scores[i])
    assert [x.item.id for x in reranked.results[:16]] == [first[i].item.id for i in order]
    assert [x.found_at for x in reranked.results] == [i + 1 for i in order] + [17, 18, 19, 20]
    assert [x.relevance is None for x in reranked.results] == [False] * 16 + [True] * 4
    assert list(reranked.ms)[-1] == "rerank"


def test_a_comparison_says_what_both_found(engine, shelf):
    compared = engine.compare(shelf, QUERY, Settings("raw", k=6), Settings("s1", k=6))
    left, right = ([x.item.id for x in side.results] for side in (compared.left, compared.right))
    assert compared.shared == [i for i in left if i in right]
    assert [side.settings.model for side in (compared.left, compared.right)] == ["raw", "s1"]


def test_the_map_is_the_plane_of_most_variance(engine, models, shelf, items):
    drawn = engine.map(shelf, "s1", query={"image": items[3].instance["image"]})
    pca = PCA(2).fit(shelf.vectors(models, "s1"))
    expected = pca.transform(shelf.vectors(models, "s1"))
    np.testing.assert_allclose(np.abs(drawn.points), np.abs(expected), atol=1e-4)
    np.testing.assert_allclose(drawn.explained, pca.explained_variance_ratio_, rtol=1e-3)
    np.testing.assert_allclose(drawn.query, drawn.points[3], atol=1e-4)  # a query lies where it would as an item
    with pytest.raises(ValueError, match="at least 3 items"):
        engine.map(Shelf("x", items[:2], shelf.folder), "s1")


def test_a_pair_has_a_cosine_and_both_logits(engine, models, items):
    document = items[1].instance
    score = engine.score_pair(QUERY, document, "s1", "Find it.")
    with models.embedder("s1") as embedder:
        cosine = embedder.similarity(embedder.encode([QUERY], "Find it."), embedder.encode([document]))[0, 0]
    with models.reranker() as reranker:
        [relevance] = reranker.score(QUERY, [document], "Find it.")
    assert score.cosine == pytest.approx(cosine, abs=1e-5)
    assert score.relevance == pytest.approx(relevance, abs=1e-5)
    assert Engine(Models(["s1"], None)).score_pair(QUERY, QUERY, "s1").relevance is None


# --- files of visitors


def test_content_decides_what_a_file_is(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.mp4")
    (tmp_path / "b.jpg").write_text("only words\n", encoding="utf-8")
    (tmp_path / "c.png").write_bytes(video_bytes(Clip(np.zeros((4, 32, 32, 3), np.uint8), 2.0)))
    found = [read_upload(tmp_path / name) for name in ("a.mp4", "b.jpg", "c.png")]
    assert [x.kind for x in found] == ["picture", "text", "clip"] and [x.title for x in found] == ["a", "b", "c"]
    assert found[0].instance["image"].size == (40, 30) and found[1].instance == {"text": "only words"}
    assert found[2].instance["video"].fps == pytest.approx(2.0)


def test_pictures_are_upright_and_no_larger_than_they_need_to_be(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    Image.new("RGB", (2000, 1000), "red").save(tmp_path / "photo.jpg", exif=exif)
    assert read_upload(tmp_path / "photo.jpg").instance["image"].size == (512, 1024)


def test_a_frame_that_stays_counts_as_several(tmp_path):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "lime", "blue")]
    durations = [500, 1500, 500]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    clip = read_upload(tmp_path / "a.gif").instance["video"]
    assert clip.fps == 2 and clip.frames[:, 0, 0].argmax(axis=1).tolist() == [0, 1, 1, 1, 2]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("empty.png", b"", "empty.png is empty"),
        ("noise.png", bytes(range(256)) * 8, "noise.png is none of what can be read: a picture"),
        ("cut.png", "cut", "cut.png is damaged or not a real picture"),
        ("cut.mp4", b"\0\0\0\x18ftypmp42" + bytes(64), "cut.mp4 is damaged or has no pictures"),
        ("playlist.m3u8", b"\x00#EXTM3U\n", "none of what can be read"),
        ("long.txt", b"a" * 100_000, "of up to 64 kB"),
    ],
)
def test_a_bad_file_is_named_with_the_remedy(tmp_path, name, content, message):
    if content == "cut":
        buffer = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(buffer, "PNG")
        content = buffer.getvalue()[:2000]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_upload(tmp_path / name)


def test_what_is_too_large_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    picture = png(tmp_path / "a.png", size=(300, 300))
    clip = tmp_path / "a.mkv"
    clip.write_bytes(video_bytes(Clip(np.zeros((4, 32, 32, 3), np.uint8), 2.0)))
    monkeypatch.setattr("q3vl_mini.media.load_image", None)
    monkeypatch.setattr("q3vl_mini.media.load_video", None)
    for limit, value, file, message in [
        ("IMAGE_PIXELS", 89_999, picture, "300 x 300 pixels"),
        ("IMAGE_BYTES", 100, picture, "a picture may have"),
        ("VIDEO_PIXELS", 1000, clip, "32 x 32 pixels"),
        ("VIDEO_SECONDS", 1, clip, "2 s and 4 frames; a clip may have"),
        ("VIDEO_FRAMES", 3, clip, "2 s and many frames; a clip may have"),
        ("VIDEO_BYTES", 100, clip, "a clip may have"),
    ]:
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=message):
            patch.setattr(uploads, limit, value)
            read_upload(file)


def test_a_moving_picture_is_bounded_like_a_clip_in_each_of_its_frames(tmp_path, monkeypatch):
    def split(image):
        buffer = io.BytesIO()
        image.save(buffer, "GIF")
        content = buffer.getvalue()
        start = 13 + 3 * 2 ** ((content[10] & 7) + 1)  # after the head and its palette
        return content[:start], content[start:-1]

    small, large = Image.new("L", (30, 30), 9), Image.new("L", (90, 90), 9)
    others = [small.point(lambda x, grey=grey: grey) for grey in (0, 90, 200)]
    small.save(tmp_path / "a.gif", save_all=True, append_images=others, duration=500)
    (tmp_path / "grows.gif").write_bytes(b"".join([*split(small), split(large)[1], b";"]))
    monkeypatch.setattr(uploads, "VIDEO_PIXELS", 40 * 40)
    with pytest.raises(ValueError, match="grows.gif is damaged or not a real picture"):
        read_upload(tmp_path / "grows.gif")
    # its frames are not counted first, which would read a file of a million of them to its end
    monkeypatch.setattr("PIL.GifImagePlugin.GifImageFile.n_frames", property(lambda self: 1 / 0))
    assert len(read_upload(tmp_path / "a.gif").instance["video"].frames) == 4
    with monkeypatch.context() as patch:
        patch.setattr(uploads, "MOVING_PIXELS", 100)
        assert len(read_upload(tmp_path / "a.gif").instance["video"].frames) == 1
    monkeypatch.setattr(uploads, "VIDEO_PIXELS", 20 * 20)
    with pytest.raises(ValueError, match="a.gif has 30 x 30 pixels; make it smaller"):
        read_upload(tmp_path / "a.gif")


@pytest.mark.parametrize("name", ["pages.tif", "photo.mpo"])
def test_pages_and_what_a_phone_puts_beside_a_photograph_do_not_move(tmp_path, name):
    first, second = Image.new("RGB", (1600, 1500), "red"), Image.new("RGB", (40, 30))
    first.save(tmp_path / name, save_all=True, append_images=[second])
    upload = read_upload(tmp_path / name)
    assert upload.kind == "picture" and load_image(upload.instance["image"])[0, 0].tolist()[1:] == [0, 0]


def test_what_is_too_long_and_thin_for_the_models_spoils_no_collection(tmp_path, engine):
    collections = Collections(tmp_path / "home")
    collection = collections.get("ada", collections.create("ada", "x"))
    long = tmp_path / "long.mkv"
    long.write_bytes(video_bytes(Clip(np.zeros((2, 8, 1800, 3), np.uint8), 2.0)))
    files = [png(tmp_path / "a.png", size=(1, 10_000)), png(tmp_path / "b.png", size=(2000, 20)), long]
    steps = list(collection.add([*files, png(tmp_path / "good.png")]))
    assert [bool(step.problem) for step in steps] == [True, False, True, False]
    assert "a.png is 1 x 1024 pixels when it is made smaller, too long and thin; crop it" in steps[0].problem
    assert len(engine.search(collection, QUERY, Settings("s1")).results) == 2


def test_a_query_may_mix_words_and_files(tmp_path):
    pictures = [png(tmp_path / "a.png"), png(tmp_path / "b.png", "blue")]
    query = read_query("  in red ", pictures)
    assert query["text"] == ["in red"] and len(query["image"]) == 2
    with pytest.raises(ValueError, match="type some words or add a picture or a clip"):
        read_query("  ", [])
    with pytest.raises(ValueError, match="5 files are more than a query may have; take 4 at most"):
        read_query("", 5 * pictures[:1])
    assert len(read_query("a" * 5000, [])["text"][0]) == 2000


# --- own collections


@pytest.fixture
def mine(tmp_path):
    """Two pictures, a clip, a text and a bad file between them."""
    folder = tmp_path / "mine"
    folder.mkdir()
    png(folder / "a.png"), png(folder / "b.png", "blue")
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    (folder / "c.mkv").write_bytes(video_bytes(Clip(np.arange(3072, dtype=np.uint8).reshape(4, 16, 16, 3), 2.0)))
    (folder / "d.txt").write_text("words of mine", encoding="utf-8")
    return folder


def test_a_collection_is_filled_found_kept_and_deleted(mine, tmp_path, engine):
    collections = Collections(tmp_path / "home")
    id = collections.create("ada", "  my   things ")
    steps = list(collections.get("ada", id).add(sorted(mine.iterdir())))
    assert [bool(step.problem) for step in steps] == [False, False, True, False, False]
    assert steps[2].problem.startswith("bad.png is") and [step.done for step in steps] == [1, 2, 3, 4, 5]
    answer = engine.search(collections.get("ada", id), {"text": "words of mine"}, Settings("s1"))
    assert answer.results[0].item.title == "d" and answer.n_items == 4

    shutil.rmtree(mine)  # what was added does not need the files any more
    again = Collections(tmp_path / "home")
    assert again.names("ada") == {id: "my things"}
    collection = again.get("ada", id)
    assert [x.title for x in collection.items] == ["a", "b", "c", "d"]
    assert load_image(collection.items[1].instance["image"])[0, 0].tolist() == [0, 0, 255]
    assert list(collection.embed(engine.models, "s1")) == []

    again.delete("ada", id)
    assert again.names("ada") == {} and not collection.folder.exists()


@pytest.mark.parametrize("kind", [LanceStore, Index])
def test_a_collections_vectors_are_a_store_that_the_command_line_searches(
    kind, mine, tmp_path, models, capsys, monkeypatch
):
    monkeypatch.setattr(stores, "find_spec", lambda name: kind is LanceStore)
    collections = Collections(tmp_path / "home")
    collection = collections.get("ada", collections.create("ada", "x"))
    list(collection.add(sorted(mine.iterdir())))
    collection.vectors(models, "s1")
    [folder] = collection.folder.glob("vectors-*")
    assert type(open_store(folder)) is kind

    assert main(["search", str(folder), "words of mine", "--model", "s1", "--json", "--quiet"]) == 0
    hits = {hit["metadata"]["title"]: hit["metadata"] for hit in json.loads(capsys.readouterr().out)}
    assert hits.keys() == {"a", "b", "c", "d"} and hits["d"]["text"] == "words of mine"
    assert Path(hits["b"]["image"]).is_file()  # so that a reranker can look at it


def test_a_deleted_collection_does_not_come_back(mine, tmp_path, models):
    collections = Collections(tmp_path / "home")
    id = collections.create("ada", "x")
    collection = collections.get("ada", id)
    list(collection.add([mine / "a.png"]))
    collections.delete("ada", id)
    with pytest.raises(ValueError, match="“x” is gone"):  # somebody was still searching it
        collection.vectors(models, "s1")
    assert not collection.folder.exists()


def test_what_is_added_while_an_index_is_made_is_in_the_next(mine, tmp_path, models, monkeypatch):
    collections = Collections(tmp_path / "home")
    collection = collections.get("ada", collections.create("ada", "x"))
    list(collection.add([mine / "a.png"]))
    plain = Shelf.embed

    def embed(self, *names):
        monkeypatch.undo()
        yield from plain(self, *names)
        list(self.add([mine / "b.png"]))  # another thread's

    monkeypatch.setattr(Shelf, "embed", embed)
    assert len(collection.index(models, "s1", 64)) == 1
    assert len(collection.index(models, "s1", 64)) == 2


def test_the_same_content_is_taken_once(mine, tmp_path):
    collections = Collections(tmp_path / "home")
    collection = collections.get("ada", collections.create("ada", "x"))
    shutil.copytree(mine, mine / "copy")
    list(collection.add([*sorted(mine.glob("*.*")), *sorted((mine / "copy").iterdir())]))
    assert [item.title for item in collection.items] == ["a", "b", "c", "d"]


def test_a_cancelled_indexing_keeps_what_came_before(mine, tmp_path):
    collections = Collections(tmp_path / "home")
    id = collections.create("ada", "x")
    steps = collections.get("ada", id).add(sorted(mine.iterdir()))
    next(steps), next(steps)
    steps.close()
    assert [x.title for x in Collections(tmp_path / "home").get("ada", id).items] == ["a", "b"]


def test_nobody_reaches_another_owners_collection(tmp_path):
    collections = Collections(tmp_path / "home")
    id = collections.create("ada", "private")
    assert collections.names("bob") == {}
    for other in (id, f"../{collections.get('ada', id).folder.parent.name}/{id}", ".", ""):
        with pytest.raises(KeyError):
            collections.get("bob", other)
        with pytest.raises(KeyError):
            collections.delete("bob", other)
    assert collections.names("ada") == {id: "private"}
    with pytest.raises(ValueError, match="there is a collection 'private' already"):
        collections.create("ada", "private")


def test_a_folder_is_read_inside_its_root_alone(mine, tmp_path):
    (mine / "sub").mkdir()
    png(mine / "sub" / "e.png")
    png(mine / ".hidden.png")
    secret = png(tmp_path / "secret.png")
    try:
        (mine / "link.png").symlink_to(secret)
    except OSError:  # Windows, without the right to make links
        pass
    found = [path.relative_to(mine.resolve()).as_posix() for path in files_below(".", mine)]
    assert found == ["a.png", "b.png", "bad.png", "c.mkv", "d.txt", "sub/e.png"]
    for outside in ("..", str(tmp_path), "nowhere"):
        with pytest.raises(ValueError, match="there is no folder"):
            files_below(outside, mine)


# --- the page


def test_words_of_others_are_text_and_nothing_else():
    evil = '<img src=x onerror="alert(1)">${alert(2)}{{alert}}'
    item = Item(evil, "text", evil, {"text": evil})
    shown = [
        markup.cards([Result(item, 0.5, 1, 0.7)]),
        markup.plain_cards([item]),
        markup.status(evil, bad=True),
        markup.progress(1, 2, evil),
    ]
    for html in shown:
        assert "<img" not in html and "&lt;img src=x onerror=&quot;alert(1)&quot;&gt;" in html


def test_a_move_is_told_in_words(items):
    results = [Result(items[0], 0.5, 3, 0.9), Result(items[1], 0.6, 2, 0.8), Result(items[2], 0.7, 1, 0.7)]
    html = markup.cards(results, also=[items[1].id])
    moves = re.findall(r'q3-move">([^<]*)<', html)
    assert moves == ["▲ up 2 (was 3)", "= same place", "▼ down 2 (was 1)"]
    assert html.count("in both") == 1
    assert all(f'alt="{item.title}"' in html for item in items[:3])


@pytest.fixture
def page(engine, shelf, tmp_path):
    return Page(engine, shelf, Collections(tmp_path / "home"))


SETTINGS = ("s1", 256, "float32", True, False)


def test_a_bad_upload_is_a_line_of_words(page, mine):
    query = {"text": "", "files": [str(mine / "bad.png")]}
    [(said, cards, cost)] = page.search(query, "", GALLERY, [], *SETTINGS, "")
    assert 'role="status">⚠ the query: bad.png is' in said and "Traceback" not in said
    assert cards == cost == gr.skip()


def test_a_search_says_how_it_went(page):
    *_, (said, cards, cost) = page.search({"text": "a bicycle", "files": []}, "", GALLERY, [], *SETTINGS, "")
    assert "12 of 21 items" in said and "s1, 256 dimensions, float32" in said
    assert cards.count("<li>") == 12
    assert all(step in cost for step in ("prepare the query", "embed it", "search", "float32 ← in use", "binary"))


def test_a_box_that_was_never_touched_may_hold_nothing_at_all(engine, shelf, tmp_path, mine):
    page = Page(engine, shelf, Collections(tmp_path / "home"), folder=mine)
    *_, (said, legend, scatter, _) = page.draw(GALLERY, "s1", None, "")
    assert "21 items" in said and "q3-mark" in scatter
    assert list(page.search_again({"text": None, "files": []}, "", GALLERY, [], *SETTINGS, "")) == [(gr.skip(),) * 3]
    assert "choose files or a folder" in list(page.index("mine", None, None, None, "s1", ""))[-1][0]


def test_visitors_of_a_public_page_see_their_own_collections(engine, shelf, tmp_path, mine):
    public = Page(engine, shelf, Collections(tmp_path / "home"), public=True)
    visitors = [public.arrive("")[0] for _ in range(2)]
    assert len(set(visitors)) == 2 and min(map(len, visitors)) > 20
    assert public.arrive(visitors[0])[0] == visitors[0]
    list(public.index("mine", [str(mine / "a.png")], None, "", "s1", visitors[0]))
    [(name, id)] = public.owned(visitors[0])
    assert name == "mine" and public.owned(visitors[1]) == []
    [(said, *_)] = public.search({"text": "red", "files": []}, "", id, [], *SETTINGS, visitors[1])
    assert "this collection is not there" in said
    assert "not there" in public.delete(id, True, visitors[1])[0] and public.owned(visitors[0])
    with pytest.raises(ValueError, match="a public demo cannot open the folder"):
        Page(engine, shelf, Collections(tmp_path), folder=tmp_path, public=True)


def test_an_indexing_reports_progress_and_what_was_left_out(engine, shelf, tmp_path, mine):
    page = Page(engine, shelf, Collections(tmp_path / "home"), folder=mine)
    said = [step[0] for step in page.index("mine", None, None, ".", "s1", "")]
    assert "files read: 3 of 5" in said[3] and "items embedded: 4 of 4" in said[-2]
    assert "“mine” has 4 items. 4 of 5 files are in it." in said[-1] and "Left out: bad.png" in said[-1]
    [(_, id)] = page.owned("")

    (mine / "bad.png").unlink()
    (mine / "e.txt").write_text("more words", encoding="utf-8")
    def index():
        return page.index(id, None, None, ".", "s1", "")

    steps = index()
    next(steps), next(steps)
    page.cancel("")
    assert ["Cancelled. “mine” has 4 items" in step[0] for step in steps] == [True]
    page.ask_to_index("")
    page.cancel("")  # while it waits in the queue
    assert ["Cancelled before it began" in step[0] for step in index()] == [True]
    page.ask_to_index("")
    *_, (said, *_) = index()
    assert "“mine” has 5 items. 5 of 5 files are in it." in said

    assert "tick the box" in page.delete(id, False, "")[0] and page.owned("")
    assert "is deleted" in page.delete(id, True, "")[0] and not page.owned("")


def test_the_slider_of_dimensions_is_as_wide_as_the_chosen_models_vectors(engine, shelf, tmp_path, monkeypatch):
    page = Page(engine, shelf, Collections(tmp_path))
    monkeypatch.setattr(page.models, "dim", {"wide": 256, "narrow": 64}.__getitem__)
    assert (page.widest("narrow").maximum, page.widest("narrow").value) == (64, 64)
    narrower, wider = page.fitted("narrow", 256), page.fitted("wide", 64)
    assert (narrower.maximum, narrower.value, wider.maximum, wider.value) == (64, 64, 256, 64)


def test_every_input_of_the_page_has_a_label(engine, shelf, tmp_path):
    blocks = build(engine, shelf, Collections(tmp_path / "home"))
    kinds = (gr.Textbox, gr.MultimodalTextbox, gr.Radio, gr.Checkbox, gr.CheckboxGroup, gr.Dropdown, gr.Slider, gr.File)
    inputs = [block for block in blocks.blocks.values() if isinstance(block, kinds)]
    assert len(inputs) > 20
    assert [block for block in inputs if not (block.label and block.show_label)] == []


# --- the Space


def test_the_space_starts_with_the_pinned_gradio(monkeypatch):
    text = (ROOT / "demo" / "README.md").read_text(encoding="utf-8")
    card = yaml.safe_load(text.split("---")[1])
    lines = (line.partition(";")[0] for line in (ROOT / "requirements.txt").read_text().splitlines())
    pins = dict(line.split("==") for line in lines if "==" in line)
    assert card["sdk"] == "gradio" and card["sdk_version"] == pins["gradio"]
    requirements = (ROOT / "demo" / "requirements.txt").read_text(encoding="utf-8")
    assert re.search(r"^q3vl-mini\[demo\]", requirements, re.M)
    calls = []
    monkeypatch.setattr("q3vl_mini.demo.app.launch", lambda **options: calls.append(options))
    runpy.run_path(str(ROOT / "demo" / card["app_file"]), run_name="__main__")
    assert calls == [{"public": True}]
