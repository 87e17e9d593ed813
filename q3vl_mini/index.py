"""A search index on disk: every vector is compared, through float32, int8 or binary codes, with faiss's kernels.

Exact search has nothing to train or to tune, so entries can come and go. Its cost is what it scans:

| precision | bytes a vector | code | candidates by |
|---|---|---|---|
| float32 | 4 dim | the vector itself | inner product |
| int8 | dim | `compression.quantise_int8` with one step for all | inner product of the codes |
| binary | dim / 8 | `compression.pack_binary`, the signs | Hamming distance |

The candidates that int8 and binary codes find are ordered again by the float vectors (rescoring). These are kept beside
the codes: on disk if the index was opened from there, where only the candidates' are read.
"""

import json
import math
from collections.abc import Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from .compression import pack_binary, quantise_int8
from .disk import replacing, whole_folder
from .entries import Entry, Hit, Store, check_identity, check_ids, check_queries, check_settings
from .turns import Turns

FORMAT = 1
CARD, ROWS, VECTORS, CODES = "index.json", "rows.arrow", "vectors.faiss", "codes.faiss"
CARD_KEYS = {"format", "dim", "precision", "step", "identity", "count", "bytes"}
ROW_SCHEMA = pa.schema([("id", pa.string()), ("metadata", pa.string())])
CHUNKS = 100  # of the table of rows, one an add, before they are joined
COPIED_AT_ONCE = 65_536  # vectors
TRIES = 10  # to open a folder that is saved to meanwhile


def default_step(dim: int) -> float:
    """The int8 step at which LSQ starts, 2 <|v|> / sqrt(127), for unit vectors with normally distributed entries.

    Codes then reach to 18 standard deviations. It depends on the dimension alone, so a vector has the same code
    whenever it is added.
    """
    return 2 * math.sqrt(2 / math.pi / dim) / math.sqrt(127)


class Index(Store):
    """Unit vectors with string ids and metadata, searched by cosine, saved to a folder and opened memory-mapped.

    Threads may share one: searches run at the same time, an add or a delete waits for them and is seen as a whole. Any
    number of processes may open the folder while one saves to it; each has what was saved before or after.

    Args:
        dim: of the vectors; a multiple of 8 for "binary".
        precision: "float32", "int8" or "binary".
        identity: whose vectors these are, as `Embedder.identity(dim)` gives it; those of others are then refused.
        step: of the int8 codes, e.g. the learned one, `embedder.quantizers.of(dim, "int8").learned_step.item()`;
            None is `default_step(dim)`.

    >>> index = Index(2)
    >>> index.add(["east", "north"], np.eye(2))
    >>> [hit.id for hit in index.search(np.array([[0.6, 0.8]]), k=1)[0]]
    ['north']
    """

    def __init__(
        self,
        dim: int,
        precision: str = "float32",
        identity: Mapping[str, Any] | None = None,
        *,
        step: float | None = None,
    ):
        self.identity = check_settings(dim, precision, identity)
        if step is not None and not step > 0:
            raise ValueError(f"an int8 step of {step}; give one above 0, or None for {default_step(dim):.3g}")
        self.dim, self.precision = dim, precision
        self.step = (step or default_step(dim)) if precision == "int8" else None
        self._parts = _empty_parts(dim, precision)
        self._rows = ROW_SCHEMA.empty_table()  # in the order of the vectors
        self._numbers: dict[str, int] | None = None
        self._mapped = False
        self._turns = Turns()

    def __len__(self) -> int:
        return self._rows.num_rows

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes by part: "codes", 0 for float32, and "vectors", which float32 scans and the others keep to rescore."""
        sizes = {name: part.ntotal * part.code_size for name, part in self._parts.items()}
        return {"codes": sizes.get(CODES, 0), "vectors": sizes[VECTORS]}

    @wraps(Store.add)
    def add(self, *entries, **options) -> None:
        with self._turns.writing():
            super().add(*entries, **options)

    def known(self, ids: list[str]) -> list[str]:
        """See Store.known."""
        return [i for i in ids if i in self._row_numbers]

    def _put(self, ids: list[str], vectors: np.ndarray, texts: list[str]) -> None:
        self._remove(self.known(ids))
        self._into_memory()
        for name, part in self._parts.items():
            part.add(self._encode(vectors) if name == CODES else vectors)
        self._row_numbers.update(zip(ids, range(len(self), len(self) + len(ids)), strict=True))
        self._rows = pa.concat_tables([self._rows, pa.table({"id": ids, "metadata": texts}, schema=ROW_SCHEMA)])
        if self._rows["id"].num_chunks > CHUNKS:
            self._rows = self._rows.combine_chunks()

    def delete(self, ids: Sequence[str]) -> int:
        """Remove entries; how many of `ids` were there. The rows behind move up, so give many ids in one call."""
        with self._turns.writing():
            return self._remove(ids)

    def _remove(self, ids: Sequence[str]) -> int:
        rows = sorted(set(self._rows_of(ids)))
        if rows:
            self._into_memory()
            for part in self._parts.values():
                part.remove_ids(np.array(rows, dtype=np.int64))
            kept = np.ones(len(self), dtype=bool)
            kept[rows] = False
            self._rows, self._numbers = self._rows.filter(pa.array(kept)), None
        return len(rows)

    def get(self, ids: Sequence[str]) -> list[Entry]:
        """The entries of `ids`, in their order; those that are not there are left out."""
        found = []
        with self._turns.reading():
            for row in self._rows_of(ids):
                i, metadata = self._row(row)
                found.append(Entry(i, self._parts[VECTORS].reconstruct(row), metadata))
        return found

    def search(self, queries: np.ndarray, k: int = 10, rescore: int = 4) -> list[list[Hit]]:
        """For each query the `k` best hits, fewer if the index has fewer entries, by descending score.

        Args:
            queries: float (Q, dim), of length 1.
            rescore: the codes choose k * rescore candidates, and the float vectors order them. 0 leaves the order to
                the codes; the score is then their estimate of the cosine. float32 is exact, whatever is asked.

        Raises:
            ValueError: names the query and the remedy.
        """
        queries = check_queries(queries, self.dim, k, rescore)
        with self._turns.reading():
            return self._search(queries, k, rescore)

    def _search(self, queries: np.ndarray, k: int, rescore: int) -> list[list[Hit]]:
        if not len(queries) or not len(self):
            return [[] for _ in queries]
        candidates = k * max(rescore, 1) if CODES in self._parts else k
        scores, rows = self._scan(queries, min(candidates, len(self)))
        if CODES in self._parts and rescore:
            vectors_of = self._parts[VECTORS].reconstruct_batch
            with np.errstate(invalid="ignore"):
                scores = np.stack([vectors_of(found) @ query for query, found in zip(queries, rows, strict=True)])
        if (rows < 0).any() or not np.isfinite(scores).all():  # faiss leaves out what it cannot compare
            raise ValueError(
                "this index has vectors that are not finite, which it never took, so one of its files is damaged; "
                "copy the folder again, or index again"
            )
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores, rows = (np.take_along_axis(x, order, axis=1).tolist() for x in (scores, rows))
        return [list(map(self._hit, *found)) for found in zip(rows, scores, strict=True)]

    def _scan(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(estimated cosines (Q, k), row numbers (Q, k)) by what is scanned."""
        if CODES not in self._parts:
            return self._parts[VECTORS].search(queries, k)
        found, rows = self._parts[CODES].search(self._encode(queries), k)
        return (1 - 2 * found / self.dim if self.precision == "binary" else found * self.step**2), rows

    def save(self, folder: str | Path) -> None:
        """Write the index to a folder: beside it first, then in one step in place of an index that is there.

        Raises:
            ValueError: the folder has something else in it.
        """
        folder = Path(folder).resolve()
        if folder.exists() and any(folder.iterdir()) and not (folder / CARD).is_file():
            raise ValueError(f"{folder} has files in it and no {CARD}, so it is no index; give another folder")
        with self._turns.reading(), replacing(folder) as new:
            for name, part in self._parts.items():
                write = faiss.write_index_binary if isinstance(part, faiss.IndexBinary) else faiss.write_index
                write(part, str(new / name))
            with pa.OSFile(str(new / ROWS), "wb") as file, pa.ipc.new_file(file, ROW_SCHEMA) as writer:
                writer.write_table(self._rows.combine_chunks())
            card = {
                "format": FORMAT,
                "dim": self.dim,
                "precision": self.precision,
                "step": self.step,
                "identity": self.identity,
                "count": len(self),
                "bytes": {file.name: file.stat().st_size for file in sorted(new.iterdir())},
            }
            (new / CARD).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def open(cls, folder: str | Path, identity: Mapping[str, Any] | None = None) -> "Index":
        """A saved index. Its files are memory-mapped: a search reads what it needs, and the system may drop it again.

        The first add or delete copies the index into memory; the folder changes by `save` alone.

        Args:
            identity: `Embedder.identity(dim)` of the model that will ask; None compares nothing.

        Raises:
            FileNotFoundError: there is no index, or one of its files is missing.
            ValueError: a file is cut off or damaged; another format; another model, template or dimension.
        """
        folder = Path(folder).resolve()
        for tried in range(TRIES):
            place = whole_folder(folder)
            before = _stamp(place)
            try:
                index = cls._map(place, identity)
            except (FileNotFoundError, ValueError):
                now = whole_folder(folder)  # a save may just have moved the same files away, to make room for its own
                if (now == place and before == _stamp(now)) or tried == TRIES - 1:
                    raise
            else:
                if before == _stamp(place):
                    return index
                index.close()  # its files are of two saves
        raise ValueError(f"{folder} was saved to again and again while it was opened; open it when that has ended")

    @classmethod
    def _map(cls, folder: Path, identity: Mapping[str, Any] | None) -> "Index":
        card = _read_card(folder / CARD)
        check_identity(card["identity"], identity)
        index = cls(card["dim"], card["precision"], card["identity"], step=card["step"])
        for name, part in index._parts.items():
            index._parts[name] = _map_part(folder / name, part, card)
        index._rows = _map_rows(folder / ROWS, card)
        index._mapped = True
        return index

    def close(self) -> None:
        """Let go of the files of an opened index (Windows moves no file that is mapped). It cannot be used then."""
        self._parts.clear()
        self._rows = self._numbers = None

    @property
    def _row_numbers(self) -> dict[str, int]:
        """The row of each id, made when it is first needed: a search does without."""
        if self._numbers is None:
            self._numbers = {i: row for row, i in enumerate(self._rows["id"].to_pylist())}
        return self._numbers

    def _rows_of(self, ids: Sequence[str]) -> list[int]:
        return [self._row_numbers[i] for i in check_ids(ids) if i in self._row_numbers]

    def _row(self, row: int) -> tuple[str, dict[str, Any]]:
        return self._rows["id"][row].as_py(), json.loads(self._rows["metadata"][row].as_py())

    def _hit(self, row: int, score: float) -> Hit:
        i, metadata = self._row(row)
        return Hit(i, score, metadata)

    def _encode(self, vectors: np.ndarray) -> np.ndarray:
        """Codes as faiss takes them: packed bits, or whole numbers as float32."""
        if self.precision == "binary":
            return pack_binary(vectors)
        return quantise_int8(vectors, self.step).astype(np.float32)

    def _into_memory(self) -> None:
        """Copy memory-mapped parts before a change: faiss ends the process that changes a mapped index."""
        if self._mapped:
            empty = _empty_parts(self.dim, self.precision)
            self._parts = {name: _copied(part, empty[name]) for name, part in self._parts.items()}
            self._mapped = False


def _empty_parts(dim: int, precision: str) -> dict[str, faiss.Index | faiss.IndexBinary]:
    """File name: faiss index, all with the same rows. The scalar quantiser takes whole numbers from -128 to 127."""
    parts = {VECTORS: faiss.IndexFlatIP(dim)}
    if precision == "int8":
        kind = faiss.ScalarQuantizer.QT_8bit_direct_signed
        parts[CODES] = faiss.IndexScalarQuantizer(dim, kind, faiss.METRIC_INNER_PRODUCT)
    elif precision == "binary":
        parts[CODES] = faiss.IndexBinaryFlat(dim)
    return parts


def _copied(source: faiss.Index | faiss.IndexBinary, target: faiss.Index | faiss.IndexBinary):
    for start in range(0, source.ntotal, COPIED_AT_ONCE):
        target.add(source.reconstruct_n(start, min(COPIED_AT_ONCE, source.ntotal - start)))
    return target


def _stamp(folder: Path) -> tuple[int, int] | None:
    """What tells a save from the next one in the same place; None where there is none."""
    try:
        card = (folder / CARD).stat()
    except FileNotFoundError:
        return None
    return card.st_ino, card.st_mtime_ns


def _read_card(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"no index at {file.parent}: there is no {file.name}; make one with Index.save")
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(file, str(error)) from error
    if not isinstance(card, dict) or not CARD_KEYS <= card.keys():
        raise _damaged(file, f"it is not an object with {sorted(CARD_KEYS)}")
    if card["format"] != FORMAT:
        raise ValueError(f"{file} is of format {card['format']!r}, this version reads {FORMAT}; index again")
    return card


def _map_part(file: Path, empty: faiss.Index | faiss.IndexBinary, card: Mapping[str, Any]):
    """A part read from `file`, of the kind of `empty`."""
    _check_size(file, card)
    read = faiss.read_index_binary if isinstance(empty, faiss.IndexBinary) else faiss.read_index
    try:
        part = read(str(file), faiss.IO_FLAG_MMAP_IFC)
    except (RuntimeError, MemoryError) as error:
        raise _damaged(file, str(error)) from error
    if _kind(part) != _kind(empty) or part.ntotal != card["count"]:
        found = f"{type(part).__name__} of {part.ntotal} vectors of {part.d} dimensions"
        raise _damaged(file, f"it holds another {found}, {CARD} says {card['count']} of {empty.d}")
    return part


def _kind(part: faiss.Index | faiss.IndexBinary) -> tuple:
    """What two faiss indexes that are searched alike agree in, whatever is in them."""
    return type(part), part.d, part.metric_type, part.is_trained


def _map_rows(file: Path, card: Mapping[str, Any]) -> pa.Table:
    _check_size(file, card)
    try:
        rows = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        rows.validate(full=True)  # offsets that point outside would be read as they are
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, str(error)) from error
    if rows.schema != ROW_SCHEMA or len(rows) != card["count"]:
        raise _damaged(file, f"it holds {len(rows)} rows of {rows.schema.names}, {CARD} says {card['count']}")
    return rows


def _check_size(file: Path, card: Mapping[str, Any]) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; copy the whole folder again, or index the documents again")
    size, expected = file.stat().st_size, card["bytes"].get(file.name)
    if size != expected:
        raise _damaged(file, f"it has {size} bytes, {CARD} says {expected}")


def _damaged(file: Path, fault: str) -> ValueError:
    return ValueError(f"{file} is damaged or of another save: {fault}; copy the folder again, or index again")
