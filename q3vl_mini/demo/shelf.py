"""Items to search: their vectors, computed once for each model and kept on disk, and indexes made of them.

The full float32 vectors are what is kept, in a store that `q3vl-mini search` opens too (LanceDB's where that is
installed): an index of any dimension and precision is made of them in milliseconds.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from threading import Lock

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from ..compression import truncate
from ..entries import Store
from ..index import Index
from ..stores import LanceStore, make_store, open_store, write_store
from .items import Item
from .models import Models

BATCH = 16  # items that are embedded, and then kept, at once
MAX_INDEXES = 64


class Shelf:
    """Items, and in `folder` a store of their vectors for each model that has searched them.

    A store is named after the embedder's identity, so vectors of another checkpoint are never mistaken for this one's.
    shipped: a folder of files that `ship` wrote: vectors that need not be made.
    """

    def __init__(self, name: str, items: Sequence[Item], folder: str | Path, shipped: str | Path | None = None):
        self.name, self.items, self.folder = name, list(items), Path(folder)
        self.shipped = Path(shipped) if shipped is not None else None
        self.folder.mkdir(parents=True, exist_ok=True)
        self._indexes: dict[tuple, Index] = {}
        self._embedding = Lock()

    def __len__(self) -> int:
        return len(self.items)

    def item(self, id: str) -> Item:
        """The item with this id; KeyError if there is none."""
        for item in self.items:
            if item.id == id:
                return item
        raise KeyError(id)

    def embed(self, models: Models, model: str) -> Iterator[tuple[int, int]]:
        """Compute the vectors that are missing, batch by batch; yields (done, total) after each.

        Every batch is on disk before the next begins: whoever stops iterating loses nothing, and two that iterate at
        the same time share the work.
        """
        left = len(self.items)
        while left:
            with self._embedding:
                if not self.folder.is_dir():
                    raise ValueError(f"“{self.name}” is gone, somebody has deleted it; choose another one")
                known = self._known(models, model)
                missing = [item for item in self.items if item.id not in known]
                batch = missing[:BATCH]
                left = len(missing) - len(batch)
                if batch:
                    self._put(models, model, batch, last=not left)
            if batch:
                yield len(self.items) - left, len(self.items)

    def vectors(self, models: Models, model: str) -> np.ndarray:
        """The full vectors of all items, float32 (N, D), in their order; computed where they are missing."""
        items = self.items  # as they are now: somebody may add to a collection meanwhile
        for _ in self.embed(models, model):
            pass
        known = self._read(models, model, [item.id for item in items])
        return np.stack([known[item.id] for item in items]) if items else np.zeros((0, models.dim(model)))

    def index(
        self, models: Models, model: str, dim: int, precision: str = "float32", kinds: Sequence[str] = ()
    ) -> Index:
        """An index of the items' vectors, cut to `dim` dimensions: of all items, or of those of the given kinds."""
        key = (model, dim, precision, tuple(kinds))
        known = self._indexes  # an index of items that change meanwhile goes where nobody looks any more
        index = known.get(key)
        if index is None:
            chosen = [row for row, item in enumerate(self.items) if not kinds or item.kind in kinds]
            identity = models.identity(model, dim)
            index = Index(dim, precision, identity)
            if chosen:
                vectors = truncate(self.vectors(models, model)[chosen], dim)
                index.add([self.items[row].id for row in chosen], vectors, identity=identity)
            if len(known) >= MAX_INDEXES:
                known.clear()
            known[key] = index
        return index

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """While it is held, no vectors are made or kept."""
        with self._embedding:
            yield

    def changed(self) -> None:
        """To be called after `items` has been replaced by longer ones."""
        self._indexes = {}

    def ship(self, models: Models, model: str, folder: str | Path) -> Path:
        """Write the items' vectors, in 8 bits a dimension, as a file that a Shelf takes from its folder `shipped`."""
        vectors = self.vectors(models, model)
        file = Path(folder) / f"{_name(models, model)}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        steps = np.abs(vectors).max(axis=1, keepdims=True) / 127
        # levels lie between the multiples of a step, so that no sign, which is all of a binary code, is lost
        codes = np.floor(vectors / steps).astype(np.int8)
        save_file({"codes": codes, "steps": steps}, file, metadata=_ids(item.id for item in self.items))
        return file

    def _known(self, models: Models, model: str) -> set[str]:
        """The ids of items whose vectors are there."""
        known, store = set(self._shipped(models, model)), self._store(models, model)
        return known if store is None else known | set(store.known([item.id for item in self.items]))

    def _read(self, models: Models, model: str, ids: Sequence[str]) -> dict[str, np.ndarray]:
        known, store = self._shipped(models, model), self._store(models, model)
        return known if store is None else known | {entry.id: entry.vector for entry in store.get(ids)}

    def _put(self, models: Models, model: str, batch: Sequence[Item], last: bool) -> None:
        """Make the vectors of a batch and keep them. last: nothing is missing after it."""
        place, store = self._place(models, model), self._store(models, model)
        if store is None:
            store = make_store(place, models.dim(model), identity=models.identity(model))
        with models.embedder(model) as embedder:
            rows = embedder.encode([item.instance for item in batch])
        store.add([item.id for item in batch], rows, [_metadata(item) for item in batch], replace=True)
        write_store(store, place)
        if last and isinstance(store, LanceStore):
            store.compact()  # every batch is a file

    def _place(self, models: Models, model: str) -> Path:
        return self.folder / _name(models, model)

    def _store(self, models: Models, model: str) -> Store | None:
        try:
            return open_store(self._place(models, model), models.identity(model))
        except FileNotFoundError:  # nothing is kept yet
            return None

    def _shipped(self, models: Models, model: str) -> dict[str, np.ndarray]:
        if self.shipped is None or not (file := self.shipped / f"{_name(models, model)}.safetensors").is_file():
            return {}
        with safe_open(file, "numpy") as content:
            vectors = (content.get_tensor("codes") + np.float32(0.5)) * content.get_tensor("steps")
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            return dict(zip(json.loads(content.metadata()["ids"]), vectors, strict=True))


def _name(models: Models, model: str) -> str:
    identity = models.identity(model)
    return "vectors-" + blake2b(f"{identity['model']} {identity['template']}".encode(), digest_size=8).hexdigest()


def _metadata(item: Item) -> dict[str, str]:
    """What `q3vl-mini search` prints of an item, and what a reranker reads of it: its words, or its file's path."""
    content = {kind: value for kind, value in item.instance.items() if isinstance(value, str)}
    return {"title": item.title, "kind": item.kind} | content


def _ids(ids: Iterable[str]) -> dict[str, str]:
    return {"ids": json.dumps(list(ids))}
