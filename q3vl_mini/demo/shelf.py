"""Items to search: their vectors, computed once for each model and kept on disk, and indexes made of them.

The full float32 vectors are what is kept: an index of any dimension and precision is made of them in milliseconds.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from threading import Lock

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from ..compression import truncate
from ..index import Index
from .items import Item
from .models import Models

BATCH = 16  # items that are embedded, and then kept, at once
MAX_INDEXES = 64


class Shelf:
    """Items, and in `folder` a safetensors file of their vectors for each model that has searched them.

    A file is named after the embedder's identity, so vectors of another checkpoint are never mistaken for this one's.
    shipped: a folder of files that `ship` wrote; where `folder` has none for a model, one of these will do.
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
                known = self._read(models, model)
                missing = [item for item in self.items if item.id not in known]
                batch = missing[:BATCH]
                if batch:
                    with models.embedder(model) as embedder:
                        rows = embedder.encode([item.instance for item in batch])
                    known |= {item.id: row for item, row in zip(batch, rows, strict=True)}
                    self._write(models, model, known)
            left = len(missing) - len(batch)
            if batch:
                yield len(self.items) - left, len(self.items)

    def vectors(self, models: Models, model: str) -> np.ndarray:
        """The full vectors of all items, float32 (N, D), in their order; computed where they are missing."""
        items = self.items  # as they are now: somebody may add to a collection meanwhile
        for _ in self.embed(models, model):
            pass
        known = self._read(models, model)
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

    def changed(self) -> None:
        """To be called after `items` has been replaced by longer ones."""
        self._indexes = {}

    def ship(self, models: Models, model: str, folder: str | Path) -> Path:
        """Write the items' vectors, in 8 bits a dimension, as a file that a Shelf takes from its folder `shipped`."""
        vectors = self.vectors(models, model)
        file = Path(folder) / self._file(models, model).name
        file.parent.mkdir(parents=True, exist_ok=True)
        steps = np.abs(vectors).max(axis=1, keepdims=True) / 127
        # levels lie between the multiples of a step, so that no sign, which is all of a binary code, is lost
        codes = np.floor(vectors / steps).astype(np.int8)
        save_file({"codes": codes, "steps": steps}, file, metadata=_ids(item.id for item in self.items))
        return file

    def _file(self, models: Models, model: str) -> Path:
        identity = models.identity(model)
        key = blake2b(f"{identity['model']} {identity['template']}".encode(), digest_size=8).hexdigest()
        return self.folder / f"vectors-{key}.safetensors"

    def _read(self, models: Models, model: str) -> dict[str, np.ndarray]:
        file = self._file(models, model)
        if file.is_file():
            with safe_open(file, "numpy") as content:
                return dict(zip(json.loads(content.metadata()["ids"]), content.get_tensor("vectors"), strict=True))
        if self.shipped is None or not (self.shipped / file.name).is_file():
            return {}
        with safe_open(self.shipped / file.name, "numpy") as content:
            vectors = (content.get_tensor("codes") + np.float32(0.5)) * content.get_tensor("steps")
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            return dict(zip(json.loads(content.metadata()["ids"]), vectors, strict=True))

    def _write(self, models: Models, model: str, known: dict[str, np.ndarray]) -> None:
        file = self._file(models, model)
        rows = {item.id: known[item.id] for item in self.items if item.id in known}
        new = file.with_suffix(".new")
        save_file({"vectors": np.stack(list(rows.values()))}, new, metadata=_ids(rows))
        os.replace(new, file)


def _ids(ids: Iterable[str]) -> dict[str, str]:
    return {"ids": json.dumps(list(ids))}
