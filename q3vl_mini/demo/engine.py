"""The demo without a page: search with timings, compare, map, and the score of a pair, as plain dataclasses.

>>> engine = Engine(Models())  # doctest: +SKIP
>>> answer = engine.search(gallery(folder), {"text": "a red cat"}, Settings(model="s3"))  # doctest: +SKIP
>>> [(result.item.title, result.score) for result in answer.results], answer.ms  # doctest: +SKIP

Taught in notebooks/16.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ..choices import PRECISIONS
from ..compression import truncate
from ..records import Instance
from .items import Item
from .models import Models
from .shelf import Shelf

RESCORED = 4  # candidates by codes for each result, ordered again by the float vectors
RERANKED = 16  # results that the reranker reads


@dataclass(frozen=True)
class Settings:
    """How to search.

    dim: 0 is all dimensions. precision: of the index's codes, "float32", "int8" or "binary". rescore: order the first
    candidates again by their float vectors. rerank: order the first RERANKED again by the reranker. kinds: search items
    of these kinds alone; none is all. k: results.
    """

    model: str = "s3"
    dim: int = 0
    precision: str = "float32"
    rescore: bool = True
    rerank: bool = False
    instruction: str = ""
    kinds: tuple[str, ...] = ()
    k: int = 12


@dataclass(frozen=True)
class Result:
    """A found item. score: the cosine, or its estimate by codes. found_at: its rank by that, from 1. relevance: what
    the reranker says, in [0, 1], if it was asked."""

    item: Item
    score: float
    found_at: int
    relevance: float | None = None


@dataclass(frozen=True)
class Answer:
    """Results, best first; milliseconds by step, in order; what indexes of each precision take.

    bytes_scanned: what every search reads, by precision. bytes_kept: the float vectors that rescoring reads a few of.
    """

    settings: Settings
    results: list[Result]
    ms: dict[str, float]
    bytes_scanned: dict[str, int]
    bytes_kept: int
    n_items: int
    dim: int


@dataclass(frozen=True)
class Comparison:
    """Two answers to one query."""

    left: Answer
    right: Answer

    @property
    def shared(self) -> list[str]:
        """Ids of the items that both found, in the left order."""
        right = {result.item.id for result in self.right.results}
        return [result.item.id for result in self.left.results if result.item.id in right]


@dataclass(frozen=True)
class Map:
    """Vectors in the plane of their two principal components.

    points: float (N, 2), a row an item. explained: share of the variance along each. query: (2,), where a query lies.
    """

    items: list[Item]
    points: np.ndarray
    explained: np.ndarray
    query: np.ndarray | None = None


@dataclass(frozen=True)
class PairScore:
    """One query and one document: cosine of their embeddings; the reranker's two logits and the score made of them."""

    cosine: float
    yes: float | None
    no: float | None
    ms: dict[str, float]

    @property
    def relevance(self) -> float | None:
        """sigmoid(logit(yes) - logit(no)), the report's equation 5."""
        return None if self.yes is None else 1 / (1 + math.exp(self.no - self.yes))


@dataclass
class Stopwatch:
    """Milliseconds by step."""

    ms: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.ms[step] = self.ms.get(step, 0.0) + 1000 * (time.perf_counter() - start)


class Engine:
    """Search, compare, map and score pairs with some models. Taught in notebooks/16."""

    def __init__(self, models: Models):
        self.models = models

    def search(self, shelf: Shelf, query: Instance, settings: Settings = Settings()) -> Answer:
        """The items of a shelf nearest to a query.

        The vectors of the items are made first where they are missing (`Shelf.embed` does it with progress); that is
        not in the timings.

        Raises:
            ValueError: no such model or precision, a query that cannot be read, more dimensions than there are.
            FileNotFoundError: the checkpoint is missing.
        """
        dim = settings.dim or self.models.dim(settings.model)
        possible = [p for p in PRECISIONS if p != "binary" or dim % 8 == 0]
        if settings.precision not in possible:
            raise ValueError(f"no precision {settings.precision!r} at {dim} dimensions; choose one of {possible}")
        indexes = {p: shelf.index(self.models, settings.model, dim, p, settings.kinds) for p in possible}
        index, watch = indexes[settings.precision], Stopwatch()
        vector = truncate(self._embed(settings.model, query, settings.instruction, watch), dim)
        k = max(settings.k, RERANKED) if settings.rerank else settings.k
        rescored = settings.rescore and settings.precision != "float32"
        hits, watch.ms["search"] = _fastest(lambda: index.search(vector, k * (RESCORED if rescored else 1), rescore=0))
        if rescored:
            hits, whole = _fastest(lambda: index.search(vector, k, rescore=RESCORED))
            watch.ms["rescore"] = max(whole - watch.ms["search"], 0.0)
        results = [Result(shelf.item(hit.id), hit.score, rank) for rank, hit in enumerate(hits[0], 1)]
        if settings.rerank and results:
            results = self._rerank(query, results, settings.instruction, watch)
        scanned = {p: other.nbytes["codes"] or other.nbytes["vectors"] for p, other in indexes.items()}
        return Answer(settings, results[: settings.k], watch.ms, scanned, index.nbytes["vectors"], len(index), dim)

    def compare(self, shelf: Shelf, query: Instance, left: Settings, right: Settings) -> Comparison:
        """The same query with two settings."""
        return Comparison(self.search(shelf, query, left), self.search(shelf, query, right))

    def map(self, shelf: Shelf, model: str = "s3", dim: int = 0, query: Instance | None = None) -> Map:
        """All items of a shelf, and a query if given, in two dimensions (PCA of the items' vectors).

        Raises ValueError if there are fewer than 3 items.
        """
        if len(shelf) < 3:
            raise ValueError(f"a map needs at least 3 items, there are {len(shelf)}; add some")
        dim = dim or self.models.dim(model)
        vectors = truncate(shelf.vectors(self.models, model), dim)
        mean, axes, explained = principal_axes(vectors)
        where = None
        if query is not None:
            where = (truncate(self._embed(model, query, "", Stopwatch()), dim)[0] - mean) @ axes.T
        return Map(shelf.items[: len(vectors)], (vectors - mean) @ axes.T, explained, where)

    def score_pair(self, query: Instance, document: Instance, model: str = "s3", instruction: str = "") -> PairScore:
        """Embedding cosine and, if there is a reranker, its logits of yes and no."""
        watch = Stopwatch()
        one = self._embed(model, query, instruction, watch)
        other = self._embed(model, document, "", watch)
        yes = no = None
        if self.models.reranker_path is not None:
            with self.models.reranker() as reranker, watch("rerank"):
                [(yes, no)] = reranker.yes_no_logits([(query, document)], instruction or None).tolist()
        return PairScore(float(one[0] @ other[0]), yes, no, watch.ms)

    def _embed(self, model: str, query: Instance, instruction: str, watch: Stopwatch) -> np.ndarray:
        """The full vector of one instance, (1, D), in the two steps of Embedder.encode."""
        with self.models.embedder(model) as embedder, torch.inference_mode():
            with watch("collate"):
                inputs = embedder.collate([query], instruction or None, ["the query"])
            with watch("embed"):
                return embedder(inputs).cpu().numpy()

    def _rerank(self, query: Instance, results: list[Result], instruction: str, watch: Stopwatch) -> list[Result]:
        """The first RERANKED results by falling relevance, then the others as they were."""
        first = results[:RERANKED]
        with self.models.reranker() as reranker, watch("rerank"):
            scores = reranker.score(query, [result.item.instance for result in first], instruction or None)
        order = np.argsort(-scores, kind="stable")
        return [replace(first[i], relevance=float(scores[i])) for i in order] + results[RERANKED:]


def principal_axes(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean (D,), the two axes of most variance (2, D), and the share of the variance along each (2,).

    Each axis points to where its largest entry is positive, so that a map does not flip.
    """
    mean = vectors.mean(axis=0)
    _, lengths, axes = np.linalg.svd(vectors - mean, full_matrices=False)
    axes = axes[:2] * np.sign(axes[:2][[0, 1], np.abs(axes[:2]).argmax(axis=1)])[:, None]
    return mean, axes, lengths[:2] ** 2 / max((lengths**2).sum(), 1e-12)


def _fastest(search: Callable[[], Any], repeats: int = 3) -> tuple[Any, float]:
    """What a search gives, and the fewest milliseconds of some repeats: one alone is mostly noise."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        hits = search()
        seconds.append(time.perf_counter() - start)
    return hits, 1000 * min(seconds)
