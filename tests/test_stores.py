"""stores.py: one set of tests for all stores, faiss's index among them; then what each database adds."""

import inspect
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from q3vl_mini import stores
from q3vl_mini.entries import Store
from q3vl_mini.index import Index
from q3vl_mini.stores import LanceStore, QdrantStore

DIM = 16
IDENTITY = {"model": "a" * 64, "name": "s3", "template": "report", "dim": DIM}
STRANGE_IDS = ["it's", 'a "b"', "per%cent_", "back\\slash", "new\nline", "Ω 🐱", "') OR true --", " ", "1"]


def unit(n, dim=DIM, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def names(n):
    return [f"document {i}" for i in range(n)]


class Shelf:
    """One kind of store at one place, to be closed and opened again."""

    def __init__(self, kind, folder):
        self.kind, self.folder, self.store = kind, folder, None

    def open(self, dim=DIM, precision="float32", identity=IDENTITY):
        if self.kind == "lance":
            self.store = LanceStore(self.folder / "lance", dim, precision, identity)
        elif self.kind == "qdrant":
            self.store = QdrantStore(dim, "things", self.folder / "qdrant", precision=precision, identity=identity)
        elif (self.folder / "index").exists():
            self.store = Index.open(self.folder / "index", identity)
        else:
            self.store = Index(dim, precision, identity)
        return self.store

    def reopen(self, **options):
        if self.kind == "index":
            self.store.save(self.folder / "index")
        self.store.close()
        return self.open(**options)


@pytest.fixture(params=["index", "lance", "qdrant"])
def shelf(request, tmp_path):
    if request.param != "index":
        pytest.importorskip({"lance": "lancedb", "qdrant": "qdrant_client"}[request.param])
    shelf = Shelf(request.param, tmp_path)
    yield shelf
    if shelf.store is not None:
        shelf.store.close()


@pytest.fixture
def store(shelf):
    return shelf.open()


def assert_brute_force(store, kept, k=7, seed=1):
    """A search finds what numpy finds among the vectors in the dict `kept`."""
    queries, ids = unit(3, seed=seed), list(kept)
    cosines = queries @ np.stack([kept[i] for i in ids]).T
    for hits, row in zip(store.search(queries, k=k), cosines, strict=True):
        best = np.argsort(-row)[:k]
        assert [hit.id for hit in hits] == [ids[i] for i in best]
        np.testing.assert_allclose([hit.score for hit in hits], row[best], atol=1e-5)
    assert len(store) == len(kept)


class TestEveryStore:
    def test_a_search_is_brute_force(self, store):
        store.add(names(60), unit(60))
        assert_brute_force(store, dict(zip(names(60), unit(60), strict=True)))

    def test_small_and_empty_stores(self, store):
        assert store.search(unit(2)) == [[], []] and len(store) == 0
        store.add([], unit(0))
        store.add(names(3), unit(3))
        assert [len(hits) for hits in store.search(unit(2), k=10)] == [3, 3]
        assert store.search(unit(0)) == []

    def test_after_any_changes_it_holds_what_is_left(self, shelf):
        store, kept, rng = shelf.open(), {}, np.random.default_rng(0)
        for step in range(8):
            ids = [f"{step}-{i}" for i in range(5)] + list(rng.permutation(sorted(kept))[:2])
            vectors = unit(len(ids), seed=step)
            store.add(ids, vectors, replace=True)
            kept |= dict(zip(ids, vectors, strict=True))
            gone = list(rng.permutation(sorted(kept))[:3])
            assert store.delete([*gone, "never there"]) == 3
            kept = {i: x for i, x in kept.items() if i not in gone}
            if step == 4:
                store = shelf.reopen()
            assert_brute_force(store, kept, seed=100 + step)

    def test_a_deleted_entry_never_comes_back_and_its_id_is_free_again(self, store):
        store.add(names(5), unit(5))
        assert store.delete(["document 2"]) == 1 and store.delete(["document 2"]) == store.delete([]) == 0
        assert "document 2" not in {hit.id for hit in store.search(unit(5)[2:3])[0]}
        store.add(["document 2"], unit(1, seed=9), [{"new": True}])
        [hit] = store.search(unit(1, seed=9), k=1)[0]
        assert (hit.id, hit.metadata) == ("document 2", {"new": True})

    def test_ids_and_metadata_are_any_text(self, shelf):
        store, n = shelf.open(), len(STRANGE_IDS)
        metadata = [{"id": i, "deep": {"list": [1, 2.5, None, True]}} for i in STRANGE_IDS]
        store.add(STRANGE_IDS, unit(n), metadata)
        store = shelf.reopen()
        found = [hits[0] for hits in store.search(unit(n), k=1)]
        assert [hit.id for hit in found] == STRANGE_IDS and [hit.metadata for hit in found] == metadata
        assert store.delete(STRANGE_IDS[:4]) == 4
        assert [entry.id for entry in store.get(STRANGE_IDS)] == STRANGE_IDS[4:]

    def test_entries_are_got_in_the_order_asked_for(self, store, monkeypatch):
        monkeypatch.setattr(stores, "BATCH", 8)  # several requests to Qdrant
        store.add(names(30), unit(30), [{"i": i} for i in range(30)])
        wanted = ["document 29", "absent", *names(20)]
        entries = store.get(wanted)
        assert [entry.id for entry in entries] == [i for i in wanted if i != "absent"]
        assert entries[0].metadata == {"i": 29}
        np.testing.assert_allclose(entries[0].vector, unit(30)[29], atol=1e-6)
        assert entries[0].vector.dtype == np.float32 and store.get([]) == []

    def test_an_entry_can_be_replaced(self, store):
        store.add(names(3), unit(3))
        new = unit(2, seed=4)
        store.add(["document 1", "document 3"], new, [{"v": 2}, {"v": 2}], replace=True)
        kept = dict(zip(names(3), unit(3), strict=True)) | {"document 1": new[0], "document 3": new[1]}
        assert_brute_force(store, kept)
        assert store.get(["document 1"])[0].metadata == {"v": 2}

    @pytest.mark.parametrize(
        ("ids", "vectors", "message"),
        [
            (["a", "b", "a"], unit(3), "occur more than once: 'a'"),
            (["a", "document 1", "document 0"], unit(3), "in the index already: .*document 1.*replace=True"),
            (["a", "b"], unit(3), "2 ids, 3 vectors"),
            (["a", "b", 3], unit(3), "id 2 is 3"),
            (["a", "b", "c"], unit(3) * [[1], [np.nan], [1]], r"vector 1 \('b'\) has NaN"),
            (["a", "b", "c"], unit(3) * 2, r"vector 0 \('a'\) has length 2, not 1"),
            (["a", "b", "c"], unit(3, 32), "vectors of 32 dimensions for an index of 16; compression.truncate"),
        ],
    )
    def test_wrong_entries_are_named_and_none_is_added(self, store, ids, vectors, message):
        store.add(names(2), unit(2))
        with pytest.raises(ValueError, match=message):
            store.add(ids, vectors)
        assert len(store) == 2

    def test_wrong_queries_are_refused(self, store):
        with pytest.raises(ValueError, match="query 1 has NaN"):
            store.search(unit(2) * [[1], [np.nan]])
        with pytest.raises(ValueError, match="k = 0"):
            store.search(unit(1), k=0)

    @pytest.mark.parametrize("key", ["model", "template"])
    def test_vectors_of_another_model_are_refused(self, shelf, key):
        store = shelf.open()
        store.add(["a"], unit(1), identity=IDENTITY)
        with pytest.raises(ValueError, match=f"{key}: the index has .*, these are of '?other"):
            store.add(["b"], unit(1), identity=IDENTITY | {key: "other"})
        with pytest.raises(ValueError, match=f"{key}: the index has .*, these are of '?other"):
            shelf.reopen(identity=IDENTITY | {key: "other"})
        assert shelf.open(identity=None).identity == IDENTITY and len(shelf.store) == 1

    def test_its_methods_take_what_those_of_every_store_take(self, store):
        for name, method in inspect.getmembers(Store, inspect.isfunction):
            if name in {"add", "delete", "get", "search", "close", "__len__"}:
                expected, found = (inspect.signature(m) for m in (method, getattr(type(store), name)))
                assert list(found.parameters.values()) == list(expected.parameters.values()), name
        assert (store.dim, store.precision, store.identity) == (DIM, "float32", IDENTITY)


@pytest.mark.parametrize("kind", ["lance", "qdrant"])
@pytest.mark.parametrize(
    ("options", "message"), [({"dim": 8}, "with dim=16, not 8"), ({"precision": "int8"}, "'float32', not 'int8'")]
)
def test_a_store_is_opened_as_it_was_made(kind, options, message, tmp_path):
    pytest.importorskip({"lance": "lancedb", "qdrant": "qdrant_client"}[kind])
    shelf = Shelf(kind, tmp_path)
    shelf.open(identity=None)
    with pytest.raises(ValueError, match=message):
        shelf.reopen(identity=None, **options)
    shelf.open(identity=None).close()


@pytest.mark.parametrize(
    ("module", "make", "extra"),
    [
        ("lancedb", lambda folder: LanceStore(folder, DIM), "lancedb"),
        ("qdrant_client", lambda folder: QdrantStore(DIM, "things"), "qdrant"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(module, make, extra, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"pip install \"q3vl-mini\[{extra}\]\""):
        make(tmp_path)


# --- LanceDB ---


@pytest.fixture
def lance(tmp_path):
    pytest.importorskip("lancedb")
    return lambda precision: LanceStore(tmp_path / "lance", 64, precision)


def test_a_lance_folder_opens_with_what_it_was_made_with(tmp_path):
    store = LanceStore(tmp_path / "lance", DIM, "int8", IDENTITY)
    store.add(["a"], unit(1))
    opened = LanceStore.open(tmp_path / "lance", IDENTITY)
    assert (len(opened), opened.dim, opened.precision, opened.identity) == (1, DIM, "int8", IDENTITY)
    with pytest.raises(ValueError, match="template: the index has 'report'"):
        LanceStore.open(tmp_path / "lance", IDENTITY | {"template": "released"})
    with pytest.raises(FileNotFoundError, match="no store in .*nothing"):
        LanceStore.open(tmp_path / "nothing")


@pytest.mark.parametrize(("precision", "kind"), [("float32", "IvfFlat"), ("int8", "IvfSq"), ("binary", "IvfRq")])
def test_an_index_of_lancedb_is_of_the_precision_and_rescored(lance, precision, kind):
    store, documents = lance(precision), unit(1000, 64)
    store.add(names(1000), documents)
    store.create_index()
    assert [index.index_type for index in store._table.list_indices()] == [kind]
    for hits, x in zip(store.search(documents[:5], k=5, rescore=10), documents[:5], strict=True):
        cosines = [documents[int(hit.id.split()[1])] @ x for hit in hits]
        np.testing.assert_allclose([hit.score for hit in hits], cosines, atol=1e-5)
    by_code = [hit.score for hit in store.search(documents[:1], k=5, rescore=0)[0]]
    by_vector = [hit.score for hit in store.search(documents[:1], k=5, rescore=10)[0]]
    assert (by_code == pytest.approx(by_vector, abs=1e-5)) == (precision == "float32")


def test_what_is_added_after_the_index_is_found_before_and_after_compacting(lance):
    store = lance("int8")
    store.add(names(500), unit(500, 64))
    store.create_index()
    store.add(["late"], unit(1, 64, seed=7))
    assert store.search(unit(1, 64, seed=7), k=1)[0][0].id == "late"
    store.delete(["document 0"])
    store.compact()
    assert store._table.index_stats("vector_idx").num_unindexed_rows == 0
    assert store.search(unit(1, 64, seed=7), k=1)[0][0].id == "late"
    assert "document 0" not in {hit.id for hit in store.search(unit(500, 64)[:1], k=500)[0]}


def test_two_that_have_the_folder_open_see_each_others_changes(lance):
    one, other = lance("float32"), lance("float32")
    one.add(["a"], unit(1, 64))
    assert len(other) == 1 and other.search(unit(1, 64))[0][0].id == "a"
    with pytest.raises(ValueError, match="in the index already: 'a'"):
        other.add(["a"], unit(1, 64))
    other.delete(["a"])
    assert one.search(unit(1, 64)) == [[]]


def test_a_table_of_somebody_else_is_refused(tmp_path):
    lancedb = pytest.importorskip("lancedb")
    lancedb.connect(tmp_path).create_table("entries", [{"id": "a", "vector": [0.0] * DIM}])
    with pytest.raises(ValueError, match="was not made by q3vl_mini"):
        LanceStore(tmp_path, DIM)


# --- Qdrant ---


def test_a_collection_of_somebody_else_is_refused(tmp_path):
    client = pytest.importorskip("qdrant_client")
    other = client.QdrantClient(path=str(tmp_path))
    vectors = client.models.VectorParams(size=DIM, distance=client.models.Distance.DOT)
    other.create_collection("things", vectors_config=vectors)
    other.close()
    with pytest.raises(ValueError, match="'things' was not made by q3vl_mini"):
        QdrantStore(DIM, "things", tmp_path)


def test_in_memory_nothing_is_shared():
    pytest.importorskip("qdrant_client")
    one, other = QdrantStore(DIM, "things"), QdrantStore(DIM, "things")
    one.add(["a"], unit(1))
    assert (len(one), len(other)) == (1, 0)


@pytest.fixture
def server(monkeypatch):
    """(URL, requests) of a server that answers as Qdrant does and notes (method, path, api key, body)."""
    requests, asked_version = [], threading.Event()

    class Answer(BaseHTTPRequestHandler):
        def answer(self):
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            requests.append((self.command, self.path.partition("?")[0], self.headers.get("api-key"), body))
            result = {"/collections/things/exists": {"exists": False}}.get(self.path, True)
            if self.path.startswith("/collections/things/points/query/batch"):
                payload = {"id": "a", "metadata": {"page": 3}}
                result = [{"points": [{"id": 1, "version": 1, "score": 0.5, "payload": payload}]}]
            content = {"title": "qdrant", "version": "1.20.0"} if self.path == "/" else {"result": result, "time": 0}
            content = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            if self.path == "/":  # the client asks from a thread of its own, and warns if nobody answers
                asked_version.set()

        do_GET = do_PUT = do_POST = answer

        def log_message(self, *_):
            pass

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", requests
        assert asked_version.wait(30)
        running.shutdown()


@pytest.mark.filterwarnings("ignore:Api key is used with an insecure connection")
@pytest.mark.parametrize(
    ("precision", "codes"),
    [
        ("float32", None),
        ("int8", {"scalar": {"type": "int8", "quantile": 0.99, "always_ram": True}}),
        ("binary", {"binary": {"always_ram": True}}),
    ],
)
def test_a_server_is_told_to_quantise_and_to_rescore(server, precision, codes):
    pytest.importorskip("qdrant_client")
    url, requests = server
    store = QdrantStore(DIM, "things", url, api_key="secret", precision=precision, identity=IDENTITY)
    [(_, _, key, made)] = [r for r in requests if r[:2] == ("PUT", "/collections/things")]
    assert key == "secret" and made.get("quantization_config") == codes
    assert made["vectors"] == {"size": DIM, "distance": "Cosine", "on_disk": precision != "float32"}
    assert made["metadata"] == {"q3vl_mini": {"dim": DIM, "precision": precision, "identity": IDENTITY}}
    for rescore, oversampling in [(4, 4.0), (0, 1.0)]:
        [hits] = store.search(unit(1), k=3, rescore=rescore)
        assert [(hit.id, hit.score, hit.metadata) for hit in hits] == [("a", 0.5, {"page": 3})]
        [search] = [asked for _, _, _, asked in requests if asked and "searches" in asked][-1]["searches"]
        quantised = {"quantization": {"rescore": rescore > 0, "oversampling": oversampling}}
        assert search["limit"] == 3 and search.get("params") == (None if precision == "float32" else quantised)
    store.close()
