"""Readers beside a writer, of a saved index, an index in memory and a LanceStore; one model in several threads."""

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from q3vl_mini import index as index_module
from q3vl_mini.disk import previous
from q3vl_mini.embedder import Embedder
from q3vl_mini.forward import VisualStore
from q3vl_mini.index import Index
from q3vl_mini.reranker import Reranker
from q3vl_mini.stores import LanceStore

N, DIM = 40, 16


def entries(version):
    """The same ids in every version, at the same sizes; vectors and metadata are of the version alone."""
    vectors = np.random.default_rng(version).normal(size=(N, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return [f"id {i}" for i in range(N)], vectors, [{"version": f"{version:04}"} for _ in range(N)]


def put(store, version):
    store.add(*entries(version), replace=True)


def version_of(store):
    """The version that the store shows; an error if it shows a mixture."""
    [hits] = store.search(entries(0)[1][:1], k=N)
    assert len({hit.id for hit in hits}) == N
    [version] = {hit.metadata["version"] for hit in hits}
    vectors = entries(int(version))[1]
    expected = {f"id {i}": score for i, score in enumerate(vectors @ entries(0)[1][0])}
    np.testing.assert_allclose([hit.score for hit in hits], [expected[hit.id] for hit in hits], atol=1e-5)
    return int(version)


def read(kind, folder, started, ended, seen):
    """A process that opens the folder and looks, until the writer has ended and once more."""
    versions = [version_of(kind.open(folder))]  # imports what it needs
    started.wait()
    while True:
        last = ended.is_set()
        store = kind.open(folder)
        versions.append(version_of(store))
        store.close()
        if last:
            break
    seen.put(versions)


def test_a_reader_between_the_two_moves_of_a_save_tries_again(tmp_path, monkeypatch):
    folder, store = tmp_path / "store", Index(DIM, "int8")
    put(store, 0)
    store.save(folder)
    rows_of, tried = index_module._map_rows, []

    def moved_away_at_first(file, card):
        tried.append(file.parent)
        if len(tried) == 1:
            folder.rename(previous(folder))  # the first move of the save; the second is yet to come
        return rows_of(file, card)

    monkeypatch.setattr(index_module, "_map_rows", moved_away_at_first)
    assert version_of(Index.open(folder)) == 0 and tried == [folder, previous(folder)]


@pytest.mark.slow
@pytest.mark.parametrize("kind,writes", [(Index, 200), (LanceStore, 25)])
def test_two_processes_read_while_a_third_writes(kind, writes, tmp_path):
    if kind is LanceStore:
        pytest.importorskip("lancedb")
    context, folder = multiprocessing.get_context("spawn"), tmp_path / "store"
    store = Index(DIM, "int8") if kind is Index else LanceStore(folder, DIM)

    def write(version):
        put(store, version)
        if kind is Index:
            store.save(folder)

    write(0)
    started, ended, seen = context.Barrier(3, timeout=120), context.Event(), context.Queue()
    readers = [context.Process(target=read, args=(kind, folder, started, ended, seen)) for _ in range(2)]
    for reader in readers:
        reader.start()
    started.wait()
    for version in range(1, writes + 1):
        write(version)
    ended.set()
    for _ in readers:
        versions = seen.get(timeout=120)
        assert versions == sorted(versions) and versions[-1] == writes and len(set(versions)) > 2
    for reader in readers:
        reader.join()
        assert reader.exitcode == 0


@pytest.mark.parametrize("precision", ["float32", "binary"])
def test_threads_search_an_index_while_another_changes_it(precision):
    index, ended, versions = Index(DIM, precision), threading.Event(), []
    put(index, 0)

    def look():
        while not ended.is_set():
            versions.append(version_of(index))
            assert len(index.get(["id 3", "id 5"])) == 2

    def change():
        try:
            for version in range(1, 80):
                put(index, version)
        finally:
            ended.set()

    with ThreadPoolExecutor(3) as pool:
        for job in [pool.submit(look), pool.submit(look), pool.submit(change)]:
            job.result(timeout=120)
    assert version_of(index) == 79 and len(set(versions)) > 1  # they did meet


# --- one model in several threads ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs():
    from PIL import Image

    rng = np.random.default_rng(0)

    def picture(size):
        return Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8))

    shared = picture((64, 96))
    return [
        ["a red cat", "12 green apples " * 20, {"text": "x", "instruction": "Find the answer."}],
        [{"image": shared}, {"image": picture((96, 64))}, {"text": "a picture", "image": picture((64, 64))}],
        [{"image": shared, "text": "what is this?"}, "words"],
        [{"video": [picture((64, 64)) for _ in range(4)]}, {"image": shared}],
    ]


@pytest.mark.parametrize("store", [None, "shared"])
def test_an_embedder_used_by_four_threads_gives_the_vectors_of_one(small_checkpoint, inputs, store):
    embedder = Embedder(small_checkpoint, store=VisualStore() if store else None)
    expected = [Embedder(small_checkpoint).encode(items) for items in inputs]
    assert not embedder.training
    training = set()
    for module in embedder.modules():
        module.register_forward_pre_hook(lambda module, _: training.add(module.training))
    jobs = [i % 4 for i in range(24)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: embedder.encode(inputs[i]), jobs))
    assert training == {False}
    for i, vectors in zip(jobs, found, strict=True):
        if store is None:
            np.testing.assert_array_equal(vectors, expected[i])
        else:  # which pictures went through the tower together depends on who came first
            np.testing.assert_allclose(vectors, expected[i], atol=1e-5)
    if store:
        keys = embedder.store._features
        assert embedder.store.nbytes == sum(x.nbytes for x in keys.values()) and len(keys) == 4


def test_a_reranker_used_by_four_threads_gives_the_margins_of_one(small_checkpoint, inputs):
    reranker = Reranker(small_checkpoint)
    pairs = [[("a red cat", item) for item in items] for items in inputs]
    expected = [reranker.logits(some) for some in pairs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: reranker.logits(pairs[i % 4]), range(16)))
    for i, margins in enumerate(found):
        np.testing.assert_array_equal(margins, expected[i % 4])


def test_a_model_in_training_comes_back_to_it_after_an_encode(small_checkpoint):
    embedder = Embedder(small_checkpoint)
    embedder.train()
    embedder.encode(["a"])
    assert embedder.training and embedder.model.training
