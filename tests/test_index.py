"""index.py against numpy's brute force, slow codes, a dict that undergoes the same changes, and broken files."""

import doctest
import json
import os
import re
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest

from q3vl_mini import disk
from q3vl_mini import index as index_module
from q3vl_mini.index import CARD, CODES, ROWS, VECTORS, Index, default_step

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
PRECISIONS = ["float32", "int8", "binary"]
IDENTITY = {"model": "a" * 64, "name": "s3", "template": "report", "dim": 64}


def unit(n, dim, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def names(n):
    return [f"document {i}" for i in range(n)]


def filled(n=300, dim=64, precision="float32", **options):
    index = Index(dim, precision, **options)
    index.add(names(n), unit(n, dim))
    return index


def ids(found):
    return [[hit.id for hit in hits] for hits in found]


def assert_best(found, scores, k):
    """The hits are the k best documents by scores (Q, N), with these scores."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    assert ids(found) == [[f"document {i}" for i in row] for row in order]
    found_scores = [[hit.score for hit in hits] for hits in found]
    np.testing.assert_allclose(found_scores, np.take_along_axis(scores, order, axis=1), atol=1e-5)


def assert_scores(found, scores):
    """All documents are found, in descending order, with scores (Q, N); equal scores may stand either way."""
    for hits, expected in zip(found, scores, strict=True):
        by_id = {hit.id: hit.score for hit in hits}
        np.testing.assert_allclose([by_id[i] for i in names(len(expected))], expected, atol=1e-5)
        assert [hit.score for hit in hits] == sorted(by_id.values(), reverse=True)


def slow_int8(x, step):
    """Codes by the definition, one number at a time."""
    return np.array([[min(max(round(float(v) / step), -128), 127) for v in row] for row in x])


def slow_hamming_cosines(queries, documents):
    rows = []
    for q in queries:
        differing = [sum((a > 0) != (b > 0) for a, b in zip(q, d, strict=True)) for d in documents]
        rows.append([1 - 2 * n / len(q) for n in differing])
    return np.array(rows)


# --- search ---


@pytest.mark.parametrize("n_queries", [1, 30])  # faiss computes batches of 20 and more in another way
def test_float32_is_brute_force(n_queries):
    queries = unit(n_queries, 64, seed=1)
    assert_best(filled().search(queries, k=7), queries @ unit(300, 64).T, 7)


@pytest.mark.parametrize("dim", [24, 64, 100])  # faiss has a kernel of its own for multiples of 64
@pytest.mark.parametrize("step", [None, 0.004])
def test_int8_codes_alone_score_by_the_product_of_the_codes(dim, step):
    queries = unit(5, dim, seed=1)
    s = step or default_step(dim)
    expected = slow_int8(queries, s) @ slow_int8(unit(100, dim), s).T * s**2
    assert_scores(filled(100, dim, "int8", step=step).search(queries, k=100, rescore=0), expected)


def test_binary_codes_alone_score_by_the_signs():
    queries = unit(5, 64, seed=1)
    expected = slow_hamming_cosines(queries, unit(100, 64))
    assert_scores(filled(100, 64, "binary").search(queries, k=100, rescore=0), expected)


def test_the_default_step_is_the_one_that_lsq_starts_from():
    from q3vl_mini.compression import LearnedStepQuantizer

    torch = pytest.importorskip("torch")
    quantizer = LearnedStepQuantizer(64)
    quantizer.initialise(torch.from_numpy(unit(2000, 64)))
    assert default_step(64) == pytest.approx(quantizer.learned_step.item(), rel=0.02)


def test_rescoring_orders_the_candidates_of_the_codes_by_the_vectors():
    queries, documents, step = unit(40, 64, seed=1), unit(300, 64), 0.1  # so coarse that the order suffers
    index = filled(300, 64, "int8", step=step)
    by_code = slow_int8(queries, step) @ slow_int8(documents, step).T
    last, beyond = -np.sort(-by_code, axis=1)[:, 9:11].T
    clear = np.flatnonzero(last > beyond)  # where no tie makes the tenth candidate a matter of luck
    assert len(clear) >= 10
    by_vector = np.where(by_code >= last[:, None], queries @ documents.T, -1)
    assert_best(index.search(queries[clear], k=5, rescore=2), by_vector[clear], 5)
    exact = filled(300, 64).search(queries, k=5)
    assert ids(index.search(queries, k=5, rescore=2)) != ids(exact) != ids(index.search(queries, k=5, rescore=0))


@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_rescoring_every_entry_is_brute_force(precision):
    queries = unit(10, 64, seed=1)
    assert_best(filled(200, 64, precision).search(queries, k=5, rescore=40), queries @ unit(200, 64).T, 5)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_index_with_less_than_k_entries_gives_all_and_an_empty_one_none(precision):
    assert [len(hits) for hits in filled(3, 64, precision).search(unit(2, 64), k=10)] == [3, 3]
    assert Index(64, precision).search(unit(2, 64)) == [[], []]
    assert filled(3, 64, precision).search(np.zeros((0, 64), np.float32)) == []


def test_what_an_index_takes():
    assert filled(10, 64).nbytes == {"codes": 0, "vectors": 10 * 64 * 4}
    assert filled(10, 64, "int8").nbytes == {"codes": 10 * 64, "vectors": 10 * 64 * 4}
    assert filled(10, 64, "binary").nbytes == {"codes": 10 * 8, "vectors": 10 * 64 * 4}


# --- adding and deleting ---


@pytest.mark.parametrize("precision", PRECISIONS)
def test_after_any_changes_the_index_is_that_of_what_is_left(precision, tmp_path):
    """Against a dict of vectors that undergoes the same; every tenth step goes through the disk."""
    rng = np.random.default_rng(0)
    index, kept = Index(16, precision), {}
    for step in range(60):
        new, again = [f"{step}-{i}" for i in range(4)], list(rng.permutation(sorted(kept))[:2])
        vectors = unit(len(new + again), 16, seed=step)
        index.add(new + again, vectors, replace=True)
        kept |= dict(zip(new + again, vectors, strict=True))
        gone = list(rng.permutation(sorted(kept))[:3])
        assert index.delete([*gone, gone[0], "never there"]) == len(gone)
        kept = {i: x for i, x in kept.items() if i not in gone}
        if step % 10 == 9:
            index.save(tmp_path / "index")
            index = Index.open(tmp_path / "index")
        assert len(index) == len(kept)
        query = unit(1, 16, seed=1000 + step)
        [hits] = index.search(query, k=len(kept))
        cosines = {i: x @ query[0] for i, x in kept.items()}
        assert {hit.id: hit.score for hit in hits} == pytest.approx(cosines, abs=1e-5)
        assert all(one.score >= next_one.score for one, next_one in pairwise(hits))
        for entry in index.get([*kept, gone[0]]):
            np.testing.assert_array_equal(entry.vector, kept[entry.id])
    assert len(index.get(list(kept))) == len(kept) > 50


def test_a_deleted_entry_never_comes_back_and_its_id_is_free_again():
    index = filled(5)
    assert index.delete(["document 2"]) == 1 and index.delete(["document 2"]) == 0
    assert "document 2" not in {hit.id for hit in index.search(unit(5, 64)[2:3], k=5)[0]}
    index.add(["document 2"], unit(1, 64, seed=9), [{"new": True}])
    [hit] = index.search(unit(1, 64, seed=9), k=1)[0]
    assert (hit.id, hit.metadata) == ("document 2", {"new": True}) and hit.score == pytest.approx(1)


def test_many_small_adds_are_one_index():
    index = Index(16)
    for i, x in enumerate(unit(250, 16)):
        index.add([f"document {i}"], x[None], [{"i": i}])
    found = index.search(unit(250, 16), k=1)
    assert [(hits[0].id, hits[0].metadata["i"]) for hits in found] == [(f"document {i}", i) for i in range(250)]


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (["a", "b", "a"], "occur more than once: 'a'"),
        (["a", "document 1", "document 0"], "in the index already: 'document 1', 'document 0'.*replace=True"),
        (["a", "", "b"], "id 1 is ''"),
        (["a", 7, "b"], r"id 1 is 7; ids are strings.*str\(number\)"),
        (["a", "b"], "2 ids, 3 vectors, 3 metadata"),
        ("abc", r"the string 'abc'; write \['abc'\]"),
    ],
)
def test_wrong_ids_are_named_and_nothing_is_added(new, message):
    index = filled(2, 8)
    with pytest.raises(ValueError, match=message):
        index.add(new, unit(3, 8), [{}] * 3)
    assert len(index) == 2 and {hit.id for hit in index.search(unit(1, 8))[0]} == {"document 0", "document 1"}


def wrong(value):
    x = unit(3, 8)
    x[1] = value
    return x


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (wrong(np.nan), r"vector 1 \('b'\) has NaN or infinite.*1 of 3 rows"),
        (wrong(np.inf), r"vector 1 \('b'\) has NaN or infinite"),
        (wrong(1.0), r"vector 1 \('b'\) has length 2.828, not 1; compression.truncate"),
        (wrong(0.0), r"vector 1 \('b'\) has length 0, not 1"),
        (unit(3, 16), r"vectors of 16 dimensions for an index of 8; compression.truncate\(vectors, 8\)"),
        (unit(3, 4), "vectors of 4 dimensions for an index of 8; make an index of 4"),
        (unit(3, 8)[0], r"shape \(N, 8\), got \(8,\); one vector x is x\[None\]"),
        (np.ones((3, 8), np.int8), "expected float vectors, got int8; use precision='float32'"),
    ],
)
def test_wrong_vectors_are_named_and_nothing_is_added(vectors, message):
    index = Index(8)
    with pytest.raises(ValueError, match=message):
        index.add(["a", "b", "c"], vectors)
    assert len(index) == 0


def test_half_precision_is_close_enough_to_length_1():
    Index(64).add(names(50), unit(50, 64).astype(np.float16))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_wrong_queries_are_refused(precision):
    index = filled(3, 8, precision)
    for queries, message in [(wrong(np.nan), "query 1 has NaN"), (unit(1, 16), r"16 dimensions for an index of 8")]:
        with pytest.raises(ValueError, match=message):
            index.search(queries)
    for options in ({"k": 0}, {"rescore": -1}):
        with pytest.raises(ValueError, match="ask for k >= 1 hits, and rescore >= 0"):
            index.search(unit(1, 8), **options)


def test_metadata_is_kept_as_json_keeps_it():
    index = Index(8)
    given = {"title": "Ω 🐱", "pages": (1, 2), "nested": {"none": None}}
    index.add(["a"], unit(1, 8), [given])
    given["title"] = "changed later"
    [hit] = index.search(unit(1, 8))[0]
    assert hit.metadata == {"title": "Ω 🐱", "pages": [1, 2], "nested": {"none": None}}
    for bad in ({"x": object()}, {"x": float("nan")}, "text"):
        with pytest.raises(ValueError, match="the metadata of 'b'"):
            index.add(["b"], unit(1, 8), [bad])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "an index of 0 dimensions"),
        ((8, "int4"), "no precision 'int4'; choose one of"),
        ((12, "binary"), "multiple of 8"),
        ((8, "float32", {"model": "a", "dim": 16}), r"an index of 8 dimensions with an identity of 16"),
        ((8, "float32", {"model": object()}), "the identity cannot be written as JSON"),
    ],
)
def test_wrong_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Index(*arguments)


# --- whose vectors ---


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"model": "b" * 64, "name": "s1"}, r"model: the index has a{12} \(s3\), these are of b{12} \(s1\)"),
        ({"template": "released"}, "template: the index has 'report', these are of 'released'.*index the doc"),
        ({"dim": 32}, r"dim: the index has 64, these are of 32.*compression.truncate"),
        ({"model": "b" * 64, "dim": 32}, r"model: .*; dim: "),
    ],
)
def test_vectors_of_another_model_template_or_dimension_are_refused(other, message, tmp_path):
    index = filled(3, identity=IDENTITY)
    index.save(tmp_path / "index")
    with pytest.raises(ValueError, match=message):
        index.add(["x"], unit(1, 64), identity=IDENTITY | other)
    with pytest.raises(ValueError, match=message):
        Index.open(tmp_path / "index", identity=IDENTITY | other)
    assert len(index) == 3


def test_vectors_of_the_same_model_are_taken_by_whatever_name_it_has(tmp_path):
    index = filled(3, identity=IDENTITY)
    index.add(["x"], unit(1, 64), identity=IDENTITY | {"name": "elsewhere/s3"})
    index.save(tmp_path / "index")
    assert Index.open(tmp_path / "index", identity=IDENTITY).identity == IDENTITY


def test_an_index_that_does_not_say_whose_it_is_cannot_be_compared():
    with pytest.raises(ValueError, match="does not record whose vectors.*identity=Embedder.identity"):
        Index(64).add(["x"], unit(1, 64), identity=IDENTITY)


# --- on disk ---


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_saved_index_is_the_same_after_opening(precision, tmp_path):
    index = filled(300, 64, precision, identity=IDENTITY, step=0.01)
    index.add(["last"], unit(1, 64, seed=5), [{"page": 3}])
    index.save(tmp_path / "index")
    opened = Index.open(tmp_path / "index")
    queries = np.concatenate([unit(10, 64, seed=1), unit(1, 64, seed=5)])
    for rescore in (0, 4):
        assert opened.search(queries, rescore=rescore) == index.search(queries, rescore=rescore)
    assert opened.search(queries)[-1][0].metadata == {"page": 3}
    assert (opened.identity, opened.nbytes, len(opened)) == (index.identity, index.nbytes, 301)
    assert (opened.step, opened.precision) == (index.step, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_empty_index_can_be_saved_and_opened(precision, tmp_path):
    Index(8, precision).save(tmp_path / "index")
    opened = Index.open(tmp_path / "index")
    assert opened.search(unit(1, 8)) == [[]]
    opened.add(["a"], unit(1, 8))
    assert opened.search(unit(1, 8))[0][0].id == "a"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system's list of mapped files")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_opened_index_is_mapped_not_read(precision, tmp_path):
    index = filled(300, 64, precision)
    index.save(tmp_path / "index")

    def mapped():
        return {Path(m.path).name for m in psutil.Process().memory_maps() if str(tmp_path) in m.path}

    assert mapped() == set()
    opened = Index.open(tmp_path / "index")
    assert mapped() == {ROWS, VECTORS} | ({CODES} if precision != "float32" else set())
    opened.close()
    assert mapped() == set()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_changes_reach_the_folder_by_save_alone(precision, tmp_path):
    filled(20, 64, precision).save(tmp_path / "index")
    opened = Index.open(tmp_path / "index")
    assert opened.delete(["document 3"]) == 1
    opened.add(["x"], unit(1, 64, seed=7))
    assert len(Index.open(tmp_path / "index")) == 20
    opened.save(tmp_path / "index")
    again = Index.open(tmp_path / "index")
    assert len(again) == 20 and again.search(unit(1, 64, seed=7), k=1)[0][0].id == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index"]


def test_a_save_that_is_cut_off_leaves_the_index_before(tmp_path, monkeypatch):
    filled(5).save(tmp_path / "index")
    index = filled(9)

    def full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("q3vl_mini.index.faiss.write_index", full)
        with pytest.raises(OSError, match="no space left"):
            index.save(tmp_path / "index")
    assert len(Index.open(tmp_path / "index")) == 5
    replace = os.replace

    def killed_after_the_first_move(source, target):
        if str(target).endswith("index"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(disk.os, "replace", killed_after_the_first_move)
        with pytest.raises(KeyboardInterrupt):
            index.save(tmp_path / "index")
    assert len(Index.open(tmp_path / "index")) == 5
    index.save(tmp_path / "index")
    assert len(Index.open(tmp_path / "index")) == 9


def test_a_folder_with_other_things_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="has files in it and no index.json"):
        filled(3).save(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("name", [CARD, ROWS, VECTORS, CODES])
@pytest.mark.parametrize("fault", ["missing", "cut off", "overwritten", "of another save"])
def test_a_damaged_file_is_named(name, fault, tmp_path):
    filled(300, 64, "int8").save(tmp_path / "index")
    file = tmp_path / "index" / name
    content = file.read_bytes()
    if fault == "missing":
        file.unlink()
    elif fault == "cut off":
        file.write_bytes(content[: len(content) // 2])
    elif fault == "overwritten":
        file.write_bytes(b"\x01" * len(content))
    else:
        filled(299, 64, "int8").save(tmp_path / "other")
        shutil.copy(tmp_path / "other" / name, file)
    expected = name if name != CARD or fault != "of another save" else "|".join([ROWS, VECTORS, CODES])
    with pytest.raises(FileNotFoundError if fault == "missing" else ValueError, match=expected):
        Index.open(tmp_path / "index")


@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
def test_a_vector_that_is_no_longer_finite_is_no_answer(precision, tmp_path):
    filled(20, 16, precision).save(tmp_path / "index")
    file = tmp_path / "index" / VECTORS
    with file.open("r+b") as content:
        content.seek(-16 * 4, os.SEEK_END)  # the last vector
        content.write(np.full(16, np.nan, np.float32).tobytes())
    with pytest.raises(ValueError, match="vectors that are not finite.* damaged"):
        Index.open(tmp_path / "index").search(unit(2, 16), k=20)


@pytest.mark.parametrize("name", [VECTORS, CODES])
def test_a_changed_byte_in_the_head_of_the_vectors_is_named_or_without_effect(name, tmp_path):
    index, refused = filled(20, 16, "int8"), 0
    index.save(tmp_path / "index")
    file, query = tmp_path / "index" / name, index.get(["document 3"])[0].vector[None]
    content = file.read_bytes()
    for at in range(37):  # type, dimension, count, metric
        file.unlink()  # what is mapped is left as it is
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        try:
            opened = Index.open(tmp_path / "index")
        except ValueError as error:
            refused += name in str(error)
        else:
            assert opened.search(query, k=5) == index.search(query, k=5), at
    assert refused > 9


def test_another_kind_of_faiss_index_under_our_name_is_refused(tmp_path):
    faiss = pytest.importorskip("faiss")
    filled(300, 64).save(tmp_path / "index")
    other = faiss.IndexFlatL2(64)
    other.add(unit(300, 64))
    faiss.write_index(other, str(tmp_path / "index" / VECTORS))
    with pytest.raises(ValueError, match="vectors.faiss .*IndexFlatL2"):
        Index.open(tmp_path / "index")


def test_another_format_is_refused(tmp_path):
    filled(3).save(tmp_path / "index")
    card = json.loads((tmp_path / "index" / CARD).read_text())
    (tmp_path / "index" / CARD).write_text(json.dumps(card | {"format": 99}))
    with pytest.raises(ValueError, match="format 99, this version reads 1"):
        Index.open(tmp_path / "index")


def test_no_index_is_said_to_be_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="no index at .*nowhere.*Index.save"):
        Index.open(tmp_path / "nowhere")


# --- what is said about it ---


def test_the_docstrings_example():
    outcome = doctest.testmod(index_module)
    assert outcome.attempted and not outcome.failed


def test_the_page_shows_the_results_that_are_there(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import index_sizes

    results = json.loads(index_sizes.RESULTS.read_text())
    assert index_sizes.tables(results) in PAGE, "run benchmarks/index_sizes.py --sizes"
    alone = {p: {r["recall"] for r in results["rows"] if (r["precision"], r["rescore"]) == (p, 0)} for p in PRECISIONS}
    assert alone["float32"] == {1.0} and max(alone["binary"]) < 0.9  # vectors that the signs alone cannot tell apart


def test_the_benchmark_measures_what_numpy_finds(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import index_sizes

    monkeypatch.setattr(index_sizes, "CHUNK", 300)
    monkeypatch.setattr(index_sizes, "ROUNDS", 1)
    rows = {(row["precision"], row["rescore"]): row for row in index_sizes.measure(1000, 64)}
    centres = np.random.default_rng([0, 64]).standard_normal((10, 64), dtype=np.float32)
    blocks = [(start, np.arange(start, min(start + 300, 1000))) for start in range(0, 1000, 300)]
    documents = np.concatenate([index_sizes.vectors(centres, numbers, [1, start]) for start, numbers in blocks])
    queries = index_sizes.vectors(centres, np.random.default_rng(2).integers(0, 1000, index_sizes.QUERIES), [3])
    cosines, agreement = queries @ documents.T, np.sign(queries) @ np.sign(documents).T
    exact, by_sign = (np.argsort(-scores, axis=1)[:, :10] for scores in (cosines, agreement))
    expected = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, by_sign, strict=True)])
    assert rows["binary", 0]["recall"] == pytest.approx(expected, abs=0.02)  # ties at the tenth place
    assert rows["float32", 0] | {"time": 1.0} == rows["float32", 0] and rows["float32", 0]["recall"] == 1
    assert rows["binary", 0]["scanned_bytes"] == 1000 * 8 and rows["int8", 4]["kept_bytes"] == 1000 * 64 * 4


@pytest.mark.slow
def test_the_pages_examples_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("lancedb")
    monkeypatch.chdir(tmp_path)
    scope = {}
    examples = [code for code in re.findall(r"```python\n(.*?)```", PAGE, flags=re.S) if "localhost" not in code]
    assert len(examples) == 2
    for code in examples:
        exec(compile(code, "docs/index.md", "exec"), scope)
    assert "cat" in capsys.readouterr().out
    assert len(scope["index"]) == len(scope["store"]) == 1


def test_rows_that_point_outside_of_their_file_are_refused(tmp_path):
    index = Index(8)
    index.add([f"id {i}" for i in range(20)], np.eye(20, 8, dtype=np.float32) + np.eye(20, 8, -8) + np.eye(20, 8, -16))
    index.save(tmp_path / "index")
    file = tmp_path / "index" / "rows.arrow"
    offsets = np.cumsum([0, *(len(f"id {i}") for i in range(20))]).astype("<i4")
    content = file.read_bytes()
    at = content.index(offsets.tobytes())
    offsets[5] = 2**30
    file.write_bytes(content[:at] + offsets.tobytes() + content[at + offsets.nbytes :])
    with pytest.raises(ValueError, match="rows.arrow is damaged or of another save"):
        Index.open(tmp_path / "index")
