"""What goes into an index and comes out of it: ids, unit vectors, metadata, and whose vectors they are.

The rules here are the same for every store: index.py and stores.py.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .choices import PRECISIONS
from .records import lone_surrogate

IDENTITY = ("model", "template", "dim")  # what has to agree; "name" is for people
UNIT = 1e-3  # how far a length may be from 1: half precision stays within it


@dataclass(frozen=True)
class Hit:
    """One result of a search. `score` is the cosine, after rescoring that of the float vectors."""

    id: str
    score: float
    metadata: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Entry:
    """What a store holds under an id: the float32 vector (dim,) and the metadata."""

    id: str
    vector: np.ndarray
    metadata: dict[str, Any]


class Store(ABC):
    """What index.Index, LanceStore and QdrantStore have in common: unit vectors under ids, searched by cosine."""

    dim: int
    precision: str
    identity: dict[str, Any] | None

    def add(
        self,
        ids: Sequence[str],
        vectors: np.ndarray,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        identity: Mapping[str, Any] | None = None,
        *,
        replace: bool = False,
    ) -> None:
        """Add entries; if one is wrong, none is added. Many in one call cost less than many calls.

        Args:
            ids: strings (N,). One that is there already is refused, or with `replace` gets the new entry.
            vectors: float (N, dim), of length 1.
            metadata: dicts that JSON can hold; None gives each an empty one.
            identity: of these vectors, to be compared with the store's; None compares nothing.

        Raises:
            ValueError: names the row or id and the remedy.
        """
        check_identity(self.identity, identity)
        ids, vectors, texts = check_entries(ids, vectors, metadata, self.dim)
        if not replace:
            refuse_known(self.known(ids))
        if ids:
            self._put(ids, vectors, texts)

    @abstractmethod
    def known(self, ids: list[str]) -> Iterable[str]:
        """Those of `ids` that are there."""

    @abstractmethod
    def _put(self, ids: list[str], vectors: np.ndarray, texts: list[str]) -> None:
        """Write checked entries, metadata as JSON texts; an id that is there gets the new entry."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def delete(self, ids: Sequence[str]) -> int:
        """Remove entries; how many of `ids` were there."""

    @abstractmethod
    def get(self, ids: Sequence[str]) -> list[Entry]:
        """The entries of `ids`, in their order; those that are not there are left out."""

    @abstractmethod
    def search(self, queries: np.ndarray, k: int = 10, rescore: int = 4) -> list[list[Hit]]:
        """For each query the `k` best hits, fewer if there are fewer entries, by descending score."""

    @abstractmethod
    def close(self) -> None:
        """Let go of files or connections. The store cannot be used then."""


def check_settings(dim: int, precision: str, identity: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The identity as a dict. ValueError for a dimension, precision or identity that no store can have."""
    if not isinstance(dim, (int, np.integer)) or dim < 1:
        raise ValueError(f"an index of {dim} dimensions; give those of the vectors, 1 or more")
    if precision not in PRECISIONS:
        raise ValueError(f"no precision {precision!r}; choose one of {list(PRECISIONS)}")
    if precision == "binary" and dim % 8:
        raise ValueError(f"{dim} dimensions do not fill bytes; a binary index needs a multiple of 8")
    if identity is None:
        return None
    if identity.get("dim", dim) != dim:
        raise ValueError(
            f"an index of {dim} dimensions with an identity of {identity['dim']}; write Embedder.identity(dim={dim})"
        )
    return json.loads(_json(identity, "the identity"))


def check_identity(own: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> None:
    """Refuse vectors of another model, template or dimension than a store's: `own` is its identity, `other` theirs.

    An identity is what `Embedder.identity` gives. With `other` None nothing is compared.

    Raises:
        ValueError: says what differs, both values, and the remedy; or that `own` is not recorded.
    """
    if other is None:
        return
    if own is None:
        raise ValueError(
            "this index does not record whose vectors it has, so they cannot be compared with those of "
            f"{_shown(other, 'model')}; make it again with identity=Embedder.identity(dim)"
        )
    different = [key for key in IDENTITY if own.get(key) != other.get(key)]
    if different:
        pairs = "; ".join(
            f"{key}: the index has {_shown(own, key)}, these are of {_shown(other, key)}" for key in different
        )
        remedy = "open the index with the model and template that made it, or index the documents again with these"
        if different == ["dim"]:
            remedy = "encode(..., dim=...) or compression.truncate gives vectors of the index's dimension"
        raise ValueError(f"vectors of different models cannot be compared. {pairs}. Remedy: {remedy}")


def _shown(identity: Mapping[str, Any], key: str) -> str:
    value = identity.get(key)
    if key != "model":
        return repr(value)
    return f"{str(value)[:12]} ({identity['name']})" if "name" in identity else str(value)[:12]


def unit_vectors(vectors: np.ndarray, dim: int, name: Callable[[int], str]) -> np.ndarray:
    """Float vectors (N, dim) as contiguous float32; `name(i)` is what an error calls row i.

    Raises:
        ValueError: the shape, another dimension, codes instead of floats; a row that is not finite or not of length 1.
    """
    try:
        vectors = np.asarray(vectors)
    except ValueError as error:
        raise ValueError(f"expected vectors of shape (N, {dim}), all of one length ({error})") from error
    if vectors.ndim != 2:
        raise ValueError(f"expected vectors of shape (N, {dim}), got {vectors.shape}; one vector x is x[None]")
    if vectors.dtype.kind != "f":
        raise ValueError(
            f"expected float vectors, got {vectors.dtype}; use precision='float32' in encode: an index makes its codes"
        )
    if vectors.shape[1] != dim:
        shorten = f"compression.truncate(vectors, {dim}) shortens those of a model trained for it (MRL)"
        remedy = shorten if vectors.shape[1] > dim else f"make an index of {vectors.shape[1]} dimensions"
        raise ValueError(f"vectors of {vectors.shape[1]} dimensions for an index of {dim}; {remedy}")
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    wrong = np.flatnonzero(~(np.abs(lengths - 1) <= UNIT))  # NaN is wrong too
    if len(wrong):
        row = int(wrong[0])
        if not np.isfinite(vectors[row]).all():
            fault = "has NaN or infinite entries; look at what the model was given there, or compute in float32"
        else:
            fault = f"has length {lengths[row]:.4g}, not 1; compression.truncate(vectors, {dim}) normalises"
        raise ValueError(f"{name(row)} {fault} ({len(wrong)} of {len(vectors)} rows are wrong)")
    return vectors


def check_queries(queries: np.ndarray, dim: int, k: int, rescore: int) -> np.ndarray:
    """Query vectors (Q, dim) as `unit_vectors` gives them; ValueError also for k below 1 and rescore below 0."""
    if k < 1 or rescore < 0:
        raise ValueError(f"k = {k} and rescore = {rescore}; ask for k >= 1 hits, and rescore >= 0 candidates a hit")
    return unit_vectors(queries, dim, lambda i: f"query {i}")


def check_entries(
    ids: Sequence[str], vectors: np.ndarray, metadata: Sequence[Mapping[str, Any]] | None, dim: int
) -> tuple[list[str], np.ndarray, list[str]]:
    """(ids, float32 vectors (N, dim), metadata as JSON texts) of entries to add.

    Raises:
        ValueError: as `unit_vectors`; numbers that do not match; an id that is no string, is empty or occurs twice;
            metadata that is not a JSON object. Names the row.
    """
    ids = check_ids(ids)
    vectors = unit_vectors(vectors, dim, lambda i: f"vector {i} ({ids[i]!r})" if i < len(ids) else f"vector {i}")
    metadata = [{}] * len(ids) if metadata is None else list(metadata)
    if not len(ids) == len(vectors) == len(metadata):
        raise ValueError(f"{len(ids)} ids, {len(vectors)} vectors, {len(metadata)} metadata; give one each")
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        twice = [i for i in ids if i in seen or seen.add(i)]
        raise ValueError(f"ids that occur more than once: {_some(twice)}; give each entry its own id")
    return ids, vectors, [_json(row, f"the metadata of {i!r}") for i, row in zip(ids, metadata, strict=True)]


def check_ids(ids: Sequence[str]) -> list[str]:
    """The ids as a list; ValueError for a lone string, and for an id that is no string or empty."""
    if isinstance(ids, str):
        raise ValueError(f"expected a list of ids, got the string {ids!r}; write [{ids!r}]")
    ids = list(ids)
    for row, i in enumerate(ids):
        if not isinstance(i, str) or not i:
            raise ValueError(f"id {row} is {i!r}; ids are strings that are not empty, e.g. str(number)")
        if lone_surrogate(i) is not None:
            raise ValueError(f"id {row} is {i!r}, with half a character (a lone surrogate); read it again as UTF-8")
    return ids


def refuse_known(known: Iterable[str]) -> None:
    """ValueError that names the ids of an `add` that are in the store already, if there are any."""
    if known := list(known):
        raise ValueError(f"ids that are in the index already: {_some(known)}; add(..., replace=True) replaces them")


def _some(ids: Sequence[str]) -> str:
    return ", ".join(map(repr, ids[:5])) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")


def _json(value: Mapping[str, Any], name: str) -> str:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is of type {type(value).__name__}; give a dict")
    try:
        text = json.dumps(dict(value), ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")  # fails at a lone surrogate
        return text
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{name} cannot be written as JSON ({error}); use str, numbers, bool, None, list, dict"
        ) from None
