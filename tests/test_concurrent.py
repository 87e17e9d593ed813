"""Readers beside a writer, of a saved index, an index in memory and a LanceStore."""

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from q3vl_mini.index import Index
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
