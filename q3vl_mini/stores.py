"""Stores with the interface of index.Index that databases keep: LanceDB on disk, Qdrant beside or behind a server.

LanceStore is the one to start with: a folder, no server, and the entries need not fit in memory. Both databases
compress in their own ways, of which `precision` chooses one. Their packages are extras, imported when a store is made.
"""

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa

from .entries import Entry, Hit, Store, check_identity, check_ids, check_queries, check_settings
from .index import CARD, Index

BATCH = 256  # points a request to Qdrant


def make_store(
    folder: str | Path,
    dim: int,
    precision: str = "float32",
    identity: Mapping[str, Any] | None = None,
    kind: str | None = None,
) -> Store:
    """A new store for a folder. kind: "lance", the default where LanceDB is installed, or "faiss", an Index.

    Hand it to `write_store` after what is added to it.
    """
    if (kind or ("lance" if find_spec("lancedb") else "faiss")) == "lance":
        return LanceStore(folder, dim, precision, identity)
    return Index(dim, precision, identity)


def open_store(folder: str | Path, identity: Mapping[str, Any] | None = None) -> Store:
    """The store that lies in a folder, an Index or a LanceStore; errors as their `open` has them."""
    kind = Index if (Path(folder) / CARD).is_file() else LanceStore
    return kind.open(folder, identity)


def write_store(store: Store, folder: str | Path) -> None:
    """Put on disk what was added or deleted: an Index is saved to `folder`, a database has written already."""
    if isinstance(store, Index):
        store.save(folder)


class LanceStore(Store):
    """A LanceDB table in a folder, made if it is not there. Every add or delete is on disk when it returns, and other
    processes that have the folder open see it.

    A search compares every vector, as float32, until `create_index` is called.

    Args:
        folder: of the database; one store a folder.
        dim, identity: as Index. What the folder has decides; another dimension, model or template is refused.
        precision: what `create_index` keeps of a vector: "float32" all (IVF_FLAT), "int8" 8 bits a dimension
            (IVF_SQ), "binary" 1 bit (IVF_RQ: RaBitQ).

    Raises:
        ImportError: without the extra "lancedb".
    """

    def __init__(
        self,
        folder: str | Path,
        dim: int,
        precision: str = "float32",
        identity: Mapping[str, Any] | None = None,
    ):
        lancedb = _lancedb()
        asked = {"dim": dim, "precision": precision, "identity": check_settings(dim, precision, identity)}
        database = lancedb.connect(folder, read_consistency_interval=timedelta(0))  # see what other processes write
        if "entries" in database.list_tables().tables:
            self._table = database.open_table("entries")
            kept = json.loads((self._table.schema.metadata or {}).get(b"q3vl_mini", "null"))
        else:
            kept = asked
            self._table = database.create_table("entries", schema=_lance_schema(asked))
        _check_agreed(kept, asked, f"the store in {folder}")
        self.dim, self.precision, self.identity = kept["dim"], kept["precision"], kept["identity"]

    @classmethod
    def open(cls, folder: str | Path, identity: Mapping[str, Any] | None = None) -> "LanceStore":
        """The store in a folder, with the dimension and precision that it was made with.

        Raises:
            FileNotFoundError: there is none. ValueError: `identity` is not that of its vectors.
            ImportError: without the extra "lancedb".
        """
        database = _lancedb().connect(folder) if Path(folder).is_dir() else None
        if database is None or "entries" not in database.list_tables().tables:
            raise FileNotFoundError(f"no store in {folder}; give the folder of one, or make one of a dimension")
        kept = json.loads(database.open_table("entries").schema.metadata[b"q3vl_mini"])
        check_identity(kept["identity"], identity)
        return cls(folder, kept["dim"], kept["precision"], kept["identity"])

    def __len__(self) -> int:
        return self._table.count_rows()

    def known(self, ids: list[str]) -> list[str]:
        """See Store.known."""
        return self._select(ids, ["id"])["id"].to_pylist()

    def _put(self, ids: list[str], vectors: np.ndarray, texts: list[str]) -> None:
        """One call writes one file and one version of the table."""
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), self.dim)
        rows = pa.table({"id": ids, "vector": column, "metadata": texts}, schema=self._table.schema)
        merge = self._table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
        merge.execute(rows)

    def delete(self, ids: Sequence[str]) -> int:
        """See Index.delete."""
        ids = check_ids(ids)
        return self._table.delete(_among(ids)).num_deleted_rows if ids else 0

    def get(self, ids: Sequence[str]) -> list[Entry]:
        """See Index.get."""
        ids, found = check_ids(ids), {}
        for row in self._select(ids, ["id", "vector", "metadata"]).to_pylist():
            found[row["id"]] = Entry(row["id"], np.array(row["vector"], np.float32), json.loads(row["metadata"]))
        return [found[i] for i in ids if i in found]

    def search(self, queries: np.ndarray, k: int = 10, rescore: int = 4) -> list[list[Hit]]:
        """See Index.search; `rescore` matters after `create_index`, which also makes the search approximate."""
        results = []
        for query in check_queries(queries, self.dim, k, rescore):
            search = self._table.search(query, vector_column_name="vector").distance_type("dot").limit(k)
            if rescore:
                search = search.refine_factor(rescore)
            rows = search.select(["id", "metadata", "_distance"]).to_list()
            results.append([Hit(r["id"], 1 - r["_distance"], json.loads(r["metadata"])) for r in rows])
        return results

    def create_index(self) -> None:
        """Group the vectors (IVF) and compress them, so that a search looks at the groups nearest to it alone.

        Worth it where the exact search is too slow; then a hit may be missed. What is
        added later is searched exactly until `compact`.
        """
        from lancedb.index import IvfFlat, IvfRq, IvfSq

        kind = {"float32": IvfFlat, "int8": IvfSq, "binary": IvfRq}[self.precision]
        self._table.create_index("vector", config=kind(distance_type="dot"))

    def compact(self) -> None:
        """After many small adds or deletes: join their files, and take what is new into the index, if there is one."""
        self._table.optimize()

    def close(self) -> None:
        """Nothing is open between calls; there for the common interface."""

    def _select(self, ids: list[str], columns: list[str]) -> pa.Table:
        return self._table.search().where(_among(ids) if ids else "false").select(columns).to_arrow()


def _lancedb() -> ModuleType:
    try:
        import lancedb
    except ImportError as error:
        raise ImportError('LanceStore needs LanceDB: pip install "q3vl-mini[lancedb]"') from error
    return lancedb


def _lance_schema(kept: Mapping[str, Any]) -> pa.Schema:
    fields = [("id", pa.string()), ("vector", pa.list_(pa.float32(), kept["dim"])), ("metadata", pa.string())]
    return pa.schema([pa.field(*f, nullable=False) for f in fields], metadata={"q3vl_mini": json.dumps(kept)})


def _among(ids: list[str]) -> str:
    """The rows of these ids, in SQL."""
    return "id IN (" + ", ".join("'" + i.replace("'", "''") + "'" for i in ids) + ")"


def _check_agreed(kept: Mapping[str, Any] | None, asked: Mapping[str, Any], name: str) -> None:
    """ValueError where a store was made with something else than is asked for, or not by these classes."""
    if kept is None:
        raise ValueError(f"{name} was not made by q3vl_mini; give another place or name")
    for key in ("dim", "precision"):
        if kept[key] != asked[key]:
            raise ValueError(
                f"{name} was made with {key}={kept[key]!r}, not {asked[key]!r}; open it with that, or give another "
                "place or name and index again"
            )
    check_identity(kept["identity"], asked["identity"])


class QdrantStore(Store):
    """A collection of Qdrant: in memory, in a folder, or on a server, made if it is not there.

    A point of Qdrant has a number or a UUID, so an id is kept in the payload, and its point is the UUIDv5 of it. On a
    server (version 1.16 or later) a search is approximate (HNSW), and with int8 or binary the codes are in memory and
    the float vectors on disk. In memory or in a folder the client compares every vector as float32, whatever the
    precision: that is for tests and small collections.

    Args:
        collection: its name.
        location: ":memory:", the URL of a server (http...), or a folder.
        api_key: of the server.
        dim, precision, identity: as Index. What a collection that is there was made with must agree.

    Raises:
        ImportError: without the extra "qdrant".
    """

    def __init__(
        self,
        dim: int,
        collection: str,
        location: str | Path = ":memory:",
        *,
        api_key: str | None = None,
        precision: str = "float32",
        identity: Mapping[str, Any] | None = None,
    ):
        try:
            from qdrant_client import QdrantClient, models
        except ImportError as error:
            raise ImportError('QdrantStore needs the client of Qdrant: pip install "q3vl-mini[qdrant]"') from error
        asked = {"dim": dim, "precision": precision, "identity": check_settings(dim, precision, identity)}
        self.collection, self._models = collection, models
        self._served = str(location).startswith(("http://", "https://"))
        if self._served:
            self._client = QdrantClient(url=str(location), api_key=api_key)
        elif str(location) == ":memory:":
            self._client = QdrantClient(location=":memory:")
        else:
            self._client = QdrantClient(path=str(location))
        try:
            kept = self._kept(asked)
            _check_agreed(kept, asked, f"the collection {collection!r}")
        except Exception:
            self.close()
            raise
        self.dim, self.precision, self.identity = kept["dim"], kept["precision"], kept["identity"]

    def _kept(self, asked: dict[str, Any]) -> dict[str, Any] | None:
        """What the collection was made with; it is made if it is not there."""
        if self._client.collection_exists(self.collection):
            metadata = self._client.get_collection(self.collection).config.metadata or {}
            return metadata.get("q3vl_mini")
        models = self._models
        codes = {
            "float32": None,
            "int8": models.ScalarQuantization(
                scalar=models.ScalarQuantizationConfig(type=models.ScalarType.INT8, quantile=0.99, always_ram=True)
            ),
            "binary": models.BinaryQuantization(binary=models.BinaryQuantizationConfig(always_ram=True)),
        }[asked["precision"]]
        cosine = models.Distance.COSINE
        self._client.create_collection(
            self.collection,
            vectors_config=models.VectorParams(size=asked["dim"], distance=cosine, on_disk=codes is not None),
            quantization_config=codes,
            metadata={"q3vl_mini": asked},
        )
        return asked

    def __len__(self) -> int:
        return self._client.count(self.collection, exact=True).count

    def known(self, ids: list[str]) -> Iterator[str]:
        """See Store.known."""
        return (record.payload["id"] for record in self._records(ids))

    def _put(self, ids: list[str], vectors: np.ndarray, texts: list[str]) -> None:
        """Metadata is the payload's field "metadata", by which Qdrant's own queries can filter."""
        points = (
            self._models.PointStruct(id=_point(i), vector=x.tolist(), payload={"id": i, "metadata": json.loads(text)})
            for i, x, text in zip(ids, vectors, texts, strict=True)
        )
        self._client.upload_points(self.collection, points, batch_size=BATCH, wait=True)

    def delete(self, ids: Sequence[str]) -> int:
        """See Index.delete."""
        points = [record.id for record in self._records(check_ids(ids))]
        if points:
            self._client.delete(self.collection, points, wait=True)
        return len(points)

    def get(self, ids: Sequence[str]) -> list[Entry]:
        """See Index.get."""
        ids, found = check_ids(ids), {}
        for record in self._records(ids, with_vectors=True):
            i, vector = record.payload["id"], np.array(record.vector, np.float32)
            found[i] = Entry(i, vector, record.payload["metadata"])
        return [found[i] for i in ids if i in found]

    def search(self, queries: np.ndarray, k: int = 10, rescore: int = 4) -> list[list[Hit]]:
        """See Index.search; `rescore` is Qdrant's oversampling, on a server alone."""
        models, options = self._models, {}
        if self._served and self.precision != "float32":
            quantised = models.QuantizationSearchParams(rescore=rescore > 0, oversampling=max(rescore, 1))
            options["params"] = models.SearchParams(quantization=quantised)
        requests = [
            models.QueryRequest(query=query.tolist(), limit=k, with_payload=True, **options)
            for query in check_queries(queries, self.dim, k, rescore)
        ]
        answers = self._client.query_batch_points(self.collection, requests) if requests else []
        return [[Hit(p.payload["id"], p.score, p.payload["metadata"]) for p in answer.points] for answer in answers]

    def _records(self, ids: list[str], with_vectors: bool = False) -> Iterator[Any]:
        points = [_point(i) for i in dict.fromkeys(ids)]
        for start in range(0, len(points), BATCH):
            yield from self._client.retrieve(self.collection, points[start : start + BATCH], with_vectors=with_vectors)

    def close(self) -> None:
        """Close the connection; a folder can then be opened by another store."""
        self._client.close()


def _point(i: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, i))
